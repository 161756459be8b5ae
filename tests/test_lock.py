"""The lock meets pyproject.toml, names no host, and shows how an environment differs from it."""

import runpy
import shutil
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from secateur import lock
from secateur.paths import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def a_lock(folder: Path, *lines: str) -> Path:
    path = folder / "requirements.lock"
    path.write_text(
        "".join(f"{line} \\\n    --hash=sha256:0\n    # via nothing\n" for line in lines)
    )
    return path


def test_the_lock_meets_every_requirement_of_pyproject():
    assert lock.unmet(PYPROJECT) == []


def test_the_lock_names_no_host_and_hashes_every_package():
    text = lock.LOCK.read_text()
    assert "://" not in text
    assert all("--hash=sha256:" in block for block in text.split("\n    # via")[:-1])


def test_a_version_that_pyproject_excludes_is_named_with_its_line(tmp_path):
    path = a_lock(tmp_path, "pillow==11.0", "torch==2.1")
    project = {"project": {"dependencies": ["torch>=2.9"], "optional-dependencies": {}}}
    assert lock.unmet(project, path) == [
        "requirements.lock, line 4: torch==2.1 does not meet 'torch>=2.9' of pyproject.toml"
    ]


def test_a_requirement_without_a_line_is_named(tmp_path):
    project = {"project": {"dependencies": [], "optional-dependencies": {"eval": ["rich>=13"]}}}
    (message,) = lock.unmet(project, a_lock(tmp_path, "torch==2.9"))
    assert "no line for 'rich>=13'" in message


def test_differences_name_both_versions_and_heed_markers(tmp_path):
    version = distribution("packaging").version
    path = a_lock(
        tmp_path,
        "packaging==1.0",
        f"filelock=={distribution('filelock').version}",
        "numpy==1.0 ; sys_platform == 'win32'",
        "not-installed-anywhere==1.0",
    )
    assert lock.differences(path) == {"packaging": f"{version} (lock: 1.0)"}
    assert lock.problems(path) == [
        f"packaging {version} (lock: 1.0)",
        "not-installed-anywhere is not installed (lock: 1.0)",
    ]


def test_an_edited_file_of_a_deciding_package_is_named(tmp_path, monkeypatch):
    """A copy of a small installed package, with one file changed to the same length."""
    package = distribution("filelock")
    for file in package.files:
        if "filelock" in file.parts[0]:
            target = tmp_path / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), target)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(lock, "_DECIDING", ("filelock",))
    path = a_lock(tmp_path, f"filelock=={package.version}")
    lock._installed.cache_clear()
    try:
        assert lock.problems(path) == []
        edited = tmp_path / "filelock" / "__init__.py"
        edited.write_bytes(b"#" + edited.read_bytes()[1:])
        assert lock.problems(path) == ["filelock: filelock/__init__.py was edited or deleted"]
    finally:
        lock._installed.cache_clear()


def test_a_record_holds_the_digest_or_says_what_differs(tmp_path):
    version = distribution("packaging").version
    assert lock.state(tmp_path / "none.lock")["lock"] == "not the lock"
    path = a_lock(tmp_path, f"packaging=={version}")
    assert lock.state(path) == {"lock": lock.digest(path)}
    (tmp_path / "other").mkdir()
    assert lock.state(a_lock(tmp_path / "other", "packaging==1.0")) == {
        "lock": "not the lock",
        "differences": {"packaging": f"{version} (lock: 1.0)"},
    }


@pytest.mark.parametrize("version", [(3, 10), (3, 15)])
def test_an_unsupported_python_is_refused_with_a_way_out(version):
    environment = runpy.run_path(str(ROOT / "scripts" / "environment.py"))
    with pytest.raises(environment["Unusable"], match=r"3\.11 to 3\.14.*PYTHON3="):
        environment["require_supported"](version)


def test_supported_pythons_are_those_of_pyproject():
    environment = runpy.run_path(str(ROOT / "scripts" / "environment.py"))
    oldest, newest = environment["OLDEST"], environment["NEWEST"]
    allowed = SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert [v for v in range(5, 30) if f"3.{v}" in allowed] == [*range(oldest[1], newest[1] + 1)]
