"""Records are whole or absent, and a change behind our back is noticed."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import stat
import time
from pathlib import Path

import pytest
from cells import ENVIRONMENT, altered, cell, changed, rows, save

from secateur.records import Failure, digest
from secateur.store import DamagedRecord, Store

CELL = cell("llava_1_5_7b", "scope", "11.1%", "gqa", rows("gqa", 0.5, 4), 64.0)
IDENTITY = CELL.record.identity
OLD = Path(__file__).parent / "records"  # a cell that commit a91f9cd wrote


def reseal(folder: Path, changes: dict) -> None:
    """Give a record other fields, and seal it again."""
    content = json.loads((folder / "record.json").read_text()) | changes
    content.pop("seal")
    content = {name: value for name, value in content.items() if value is not ...}
    (folder / "record.json").write_text(json.dumps(content | {"seal": digest(content)}))


@pytest.mark.parametrize("budget", ["11.1%", "64", "128/tile", "11.1%/tile", "full"])
def test_a_cell_comes_back_as_it_was_written(tmp_path, budget):
    own = changed([CELL], {"identity.budget": budget})[0]
    stored = Store(tmp_path).cell(own.record.identity)
    assert not stored.exists()
    assert save(tmp_path, own) == stored.folder
    assert stored.exists()
    assert stored.read().metrics == {"exact_match": 0.5}
    assert stored.samples()["score"].tolist() == own.rows["score"].tolist()
    assert [record.identity for record in Store(tmp_path).records()] == [own.record.identity]
    assert not list(tmp_path.rglob(".writing/*"))


def test_every_field_counts_for_the_folder():
    other = altered(IDENTITY, {"pruner.alpha": 2.0})
    assert IDENTITY.folder.parent == other.folder.parent
    assert IDENTITY.folder != other.folder
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_an_edited_or_truncated_record_is_refused(tmp_path):
    stored, folder = Store(tmp_path).cell(IDENTITY), save(tmp_path, CELL)
    text = (folder / "record.json").read_text()
    (folder / "record.json").write_text(text.replace("0.5", "0.9"))
    with pytest.raises(DamagedRecord, match="changed"):
        stored.read()
    for content in (text[:40], "[]", "null", "3", "[" * 100_000):
        (folder / "record.json").write_text(content)
        with pytest.raises(DamagedRecord, match="delete the folder"):
            stored.read()
    damaged: list[str] = []
    assert Store(tmp_path).records(damaged) == []
    assert len(damaged) == 1
    assert str(folder) in damaged[0]
    (folder / "record.json").write_text(text)
    (folder / "samples.parquet").write_bytes((folder / "samples.parquet").read_bytes()[:-10])
    with pytest.raises(DamagedRecord):
        stored.read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ...}, "metrics: Field required"),
        ({"documents": "4"}, "documents: Input should be a valid integer"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        (
            {"identity": IDENTITY.as_json() | {"budget": 16}},
            "identity.budget: Input should be a valid string",
        ),
        ({"version": 99}, "has version 99, and this release reads version 1"),
        ({"version": None}, "has version None, and this release reads version 1"),
    ],
)
def test_a_record_of_other_fields_or_another_version_is_refused(tmp_path, changes, message):
    folder = save(tmp_path, CELL)
    reseal(folder, changes)
    with pytest.raises(DamagedRecord, match=re.escape(message)):
        Store(tmp_path).records()


def test_a_folder_without_its_record_is_named_and_hidden_folders_are_none(tmp_path):
    folder = save(tmp_path, CELL)
    (folder.parent / ".hidden").mkdir()
    assert len(Store(tmp_path).records()) == 1
    (folder / "record.json").unlink()
    with pytest.raises(DamagedRecord, match=f"the record in {folder} is damaged .*No such file"):
        Store(tmp_path).records()


def test_a_record_in_the_folder_of_another_cell_is_refused(tmp_path):
    folder, other = save(tmp_path, CELL), altered(IDENTITY, {"seed": 1})
    folder.rename(Store(tmp_path).cell(other).folder)
    for read in (Store(tmp_path).cell(other).read, Store(tmp_path).records):
        with pytest.raises(DamagedRecord, match=f"that of another cell, {IDENTITY.folder}"):
            read()


def test_a_record_of_an_earlier_release_is_read(tmp_path):
    shutil.copytree(OLD, tmp_path / "runs")
    (record,) = Store(tmp_path).records()
    assert record.identity.pruner.label == "divprune"
    assert record.identity.pruner.fields == {"order": "spatial"}
    assert (record.documents, record.environment.commit, record.version) == (60, "a91f9cd", 1)
    assert record.environment.lock is None
    stored = Store(tmp_path).cell(record.identity)
    assert stored.read() == record
    assert len(stored.samples()) == 60


def test_a_failure_is_kept_and_forgotten_on_success(tmp_path):
    stored = Store(tmp_path).cell(IDENTITY)
    path = stored.write_failure("Traceback ...\nValueError: no", ENVIRONMENT, {"seed": 0})
    assert stored.failure().endswith("ValueError: no")
    assert Failure.model_validate_json(path.read_text()) == Failure(
        identity=IDENTITY,
        traceback="Traceback ...\nValueError: no",
        environment=ENVIRONMENT,
        config={"seed": 0},
    )
    assert stored.failure(since=time.time() + 10) is None
    save(tmp_path, CELL)
    assert stored.failure() is None


def test_a_damaged_failure_and_that_of_another_cell_are_refused(tmp_path):
    store, other = Store(tmp_path), altered(IDENTITY, {"seed": 1})
    path = store.cell(IDENTITY).write_failure("Traceback", ENVIRONMENT, {})
    where = store.cell(other).write_failure("Traceback", ENVIRONMENT, {})
    path.rename(where)
    with pytest.raises(DamagedRecord, match="that of another cell"):
        store.cell(other).failure()
    where.write_text("{}")
    with pytest.raises(DamagedRecord, match="is damaged"):
        store.cell(other).failure()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="results="):
        Store(tmp_path / "file")


def _hold(root, held, release):
    with Store(root).cell(IDENTITY).claim() as mine:
        assert mine
        held.set()
        release.wait(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the cell."""
    fork = multiprocessing.get_context("fork")
    held, release = fork.Event(), fork.Event()
    process = fork.Process(target=_hold, args=(tmp_path, held, release))
    process.start()
    assert held.wait(30)
    yield process, release
    process.kill()
    process.join()


def test_a_cell_that_another_process_holds_is_not_ours(tmp_path, holder):
    store, (_, release) = Store(tmp_path), holder
    with store.cell(IDENTITY).claim() as mine:
        assert not mine
    with store.cell(altered(IDENTITY, {"task": "pope"})).claim() as mine:
        assert mine
    with store.cell(IDENTITY).claim("-0of2") as mine:
        assert mine
    release.set()
    with store.cell(IDENTITY).claim(wait=True) as mine:
        assert mine


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder[0].kill()
    holder[0].join()
    with Store(tmp_path).cell(IDENTITY).claim() as mine:
        assert mine


def test_of_two_records_of_a_cell_the_first_stays(tmp_path):
    """Where locks do not reach other nodes, two of them may finish the same cell."""
    for value in (0.5, 0.6):
        save(tmp_path, *changed([CELL], {"metrics.exact_match": value}))
    assert Store(tmp_path).cell(IDENTITY).read().metrics == {"exact_match": 0.5}
    assert not list(tmp_path.rglob(".writing/*"))


def test_a_folder_without_a_record_gives_way(tmp_path):
    stored = Store(tmp_path).cell(IDENTITY)
    stored.folder.mkdir(parents=True)
    (stored.folder / "samples.parquet").write_text("left over")
    save(tmp_path, CELL)
    assert stored.read().metrics == {"exact_match": 0.5}


def test_what_a_killed_process_left_half_written_is_no_record_and_goes(tmp_path):
    folder = save(tmp_path, CELL)
    left = tmp_path / "runs" / ".writing" / f"{IDENTITY.digest[:12]}killed"
    os.rename(folder, left)
    assert Store(tmp_path).records() == []
    save(tmp_path, CELL)
    assert not left.exists()


def test_the_answers_of_a_cell_go_when_it_is_written(tmp_path):
    own = Store(tmp_path).cell(IDENTITY)
    other = Store(tmp_path).cell(altered(IDENTITY, {"seed": 1}))
    for path in (own.answers_file(), own.answers_file("-0of2"), other.answers_file()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert own.answers_files() == [own.answers_file("-0of2"), own.answers_file()]
    save(tmp_path, CELL)
    assert own.answers_files() == []
    assert other.answers_files()


def test_a_cell_has_the_rights_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        folder = save(tmp_path, CELL)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}


def test_a_cell_that_this_user_may_not_read_is_named(tmp_path, monkeypatch):
    folder = save(tmp_path, CELL)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder and allowed(path, mode))
    with pytest.raises(DamagedRecord, match=f"may not read {folder}"):
        Store(tmp_path).records()


def test_a_failure_of_the_future_is_an_old_one(tmp_path):
    """The clock of another machine was wrong."""
    stored, now = Store(tmp_path).cell(IDENTITY), time.time()
    path = stored.write_failure("Traceback", ENVIRONMENT, {})
    assert stored.failure(since=now - 1)
    os.utime(path, (now + 9999, now + 9999))
    assert stored.failure(since=now - 1) is None


def test_a_file_system_without_locks_is_named_with_a_remedy(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("secateur.store._Lock.acquire", refuse)
    with (
        pytest.raises(OSError, match=r"gives no locks \(No locks available\).*set results="),
        Store(tmp_path).cell(IDENTITY).claim(),
    ):
        pass


def test_a_held_cell_says_who_holds_it(tmp_path, holder):
    said = Store(tmp_path).cell(IDENTITY).holder()
    assert re.fullmatch(rf"process {holder[0].pid} on .+, since \d{{4}}-.*", said)
    holder[1].set()
    holder[0].join()
    assert Store(tmp_path).cell(IDENTITY).holder() == "another process"
