"""The commit of the code: in a checkout of any state, without a checkout, without git."""

import subprocess

import pytest
import torch

from secateur import cell, source
from secateur.source import commit_of


def git(folder, *arguments):
    who = ["-c", "user.name=A Tester", "-c", "user.email=tester@example.org"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "file.py").write_text("1\n")
    git(folder, "add", "file.py")
    git(folder, "commit", "--quiet", "--message", "First")
    return folder


def test_a_clean_checkout_is_its_commit(checkout):
    assert commit_of(checkout) == git(checkout, "rev-parse", "--short", "HEAD")


def test_a_tag_does_not_replace_the_commit(checkout):
    git(checkout, "tag", "--annotate", "v1", "--message", "One")
    assert commit_of(checkout) == git(checkout, "rev-parse", "--short", "HEAD")


def test_edited_sources_are_dirty(checkout):
    (checkout / "file.py").write_text("2\n")
    assert commit_of(checkout) == git(checkout, "rev-parse", "--short", "HEAD") + "-dirty"


def test_a_link_to_the_checkout_is_the_checkout(checkout, tmp_path):
    (tmp_path / "link").symlink_to(checkout)
    assert commit_of(tmp_path / "link") == git(checkout, "rev-parse", "--short", "HEAD")


def test_a_hook_of_another_repository_does_not_change_it(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "another"))
    known = commit_of(checkout)
    monkeypatch.undo()
    assert known == git(checkout, "rev-parse", "--short", "HEAD")


def test_a_folder_without_a_repository(tmp_path):
    assert commit_of(tmp_path) == "unknown: not a checkout"


def test_code_installed_inside_another_repository_does_not_take_its_commit(checkout):
    installed = checkout / ".venv" / "lib" / "site-packages"
    installed.mkdir(parents=True)
    assert commit_of(installed) == "unknown: not a checkout"


def test_a_repository_without_a_commit_says_so(tmp_path):
    git(tmp_path, "init", "--quiet")
    assert commit_of(tmp_path).startswith("unknown: ")


def test_a_folder_of_another_owner(checkout, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for its tests
    assert commit_of(checkout) == (
        "unknown: git refuses a folder of another owner, see safe.directory"
    )


def test_without_git_a_cell_records_that(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(checkout) == "unknown: git is not installed"
    source.commit.cache_clear()
    try:
        found = cell.environment(torch.device("cpu")).commit
    finally:
        source.commit.cache_clear()
    assert found == "unknown: git is not installed"


def test_a_git_that_cannot_be_run(checkout, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text("not a program\n")
    (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert commit_of(checkout).startswith("unknown: git cannot be run (")


def test_the_commit_is_read_once_in_a_process(monkeypatch):
    asked = []
    monkeypatch.setattr(source, "commit_of", lambda root: asked.append(root) or "abc")
    source.commit.cache_clear()
    try:
        assert [source.commit(), source.commit()] == ["abc", "abc"]
    finally:
        source.commit.cache_clear()
    assert asked == [source.ROOT]


def test_code_that_was_edited_after_the_start_is_named(monkeypatch):
    source.check_unchanged()
    now = source._files()
    monkeypatch.setattr(source, "_files", lambda: now | {"models.py": "other"})
    before = source.code()
    with pytest.raises(ValueError, match=r"models\.py changed after this sweep had started"):
        source.check_unchanged()
    assert source.code() == before


def test_every_module_that_decides_answers_counts():
    names = set(source._files())
    assert {"models.py", "inputs.py", "injection/prompt.py", "families/llava.py"} <= names
    assert {"tasks/metrics.py", "prompts.py", "budget.py", "loading.py"} <= names
    assert not {"store.py", "progress.py", "reporting/stats.py"} & names
