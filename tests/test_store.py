"""Records are whole or absent, and a change behind our back is noticed."""

import json
import multiprocessing
import os
import time

import pandas as pd
import pytest

from secateur.store import DamagedRecord, Store, digest

IDENTITY = {
    "model": {"name": "m"},
    "suite": {"name": "s"},
    "task": "pope",
    "pruner": {"name": "scope", "alpha": 1.0},
    "budget": "11.1%",
}
ROWS = pd.DataFrame({"doc_id": [0, 1], "score": [1.0, 0.0], "kept_indices": [[[0, 1]], [[2, 3]]]})


@pytest.mark.parametrize("budget", ["11.1%", "64", "128/tile", "11.1%/tile", "full"])
def test_a_cell_comes_back_as_it_was_written(tmp_path, budget):
    store, identity = Store(tmp_path), IDENTITY | {"budget": budget}
    assert not store.has(identity)
    folder = store.write(identity, {"metrics": {"x": 0.5}}, ROWS)
    assert store.has(identity)
    assert store.load(identity)["metrics"] == {"x": 0.5}
    assert store.samples(folder)["score"].tolist() == [1.0, 0.0]
    assert [record["identity"] for record in store.records()] == [identity]
    assert not list(tmp_path.rglob(".writing/*"))


def test_every_field_counts_for_the_place(tmp_path):
    store = Store(tmp_path)
    other = IDENTITY | {"pruner": {"name": "scope", "alpha": 2.0}}
    assert store.folder(IDENTITY) != store.folder(other)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_an_edited_or_truncated_record_is_refused(tmp_path):
    store = Store(tmp_path)
    folder = store.write(IDENTITY, {"metrics": {"x": 0.5}}, ROWS)
    text = (folder / "record.json").read_text()
    (folder / "record.json").write_text(text.replace("0.5", "0.9"))
    with pytest.raises(DamagedRecord, match="changed"):
        store.load(IDENTITY)
    (folder / "record.json").write_text(text[:40])
    with pytest.raises(DamagedRecord, match="delete the folder"):
        store.load(IDENTITY)
    for content in ("[]", "null", "3"):
        (folder / "record.json").write_text(content)
        with pytest.raises(DamagedRecord, match="delete the folder"):
            store.records()
    damaged: list[str] = []
    assert store.records(damaged) == []
    assert len(damaged) == 1
    assert str(folder) in damaged[0]
    (folder / "record.json").write_text(text)
    (folder / "samples.parquet").write_bytes((folder / "samples.parquet").read_bytes()[:-10])
    with pytest.raises(DamagedRecord):
        store.load(IDENTITY)


def test_a_failure_is_kept_and_forgotten_on_success(tmp_path):
    store = Store(tmp_path)
    path = store.write_failure(
        IDENTITY, "Traceback ...\nValueError: no", {"device": "cpu"}, {"seed": 0}
    )
    assert store.failure(IDENTITY).endswith("ValueError: no")
    content = json.loads(path.read_text())
    assert (content["identity"], content["environment"], content["config"]) == (
        IDENTITY,
        {"device": "cpu"},
        {"seed": 0},
    )
    assert store.failure(IDENTITY, since=time.time() + 10) is None
    store.write(IDENTITY, {"metrics": {}}, ROWS)
    assert store.failure(IDENTITY) is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="results="):
        Store(tmp_path / "file")


def _hold(root, held, release):
    with Store(root).claim(IDENTITY) as mine:
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
    with store.claim(IDENTITY) as mine:
        assert not mine
    with store.claim(IDENTITY | {"task": "gqa"}) as mine:
        assert mine
    with store.claim(IDENTITY, part="-0of2") as mine:
        assert mine
    release.set()
    with store.claim(IDENTITY, wait=True) as mine:
        assert mine


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder[0].kill()
    holder[0].join()
    with Store(tmp_path).claim(IDENTITY) as mine:
        assert mine


def test_of_two_records_of_a_cell_the_first_stays(tmp_path):
    """Where a file system's locks do not reach other nodes, two of them may finish the same cell."""
    store = Store(tmp_path)
    for value in (0.5, 0.6):
        store.write(IDENTITY, {"metrics": {"x": value}}, ROWS)
    assert store.load(IDENTITY)["metrics"] == {"x": 0.5}
    assert not list(tmp_path.rglob(".writing/*"))


def test_a_folder_without_a_record_gives_way(tmp_path):
    store = Store(tmp_path)
    store.folder(IDENTITY).mkdir(parents=True)
    (store.folder(IDENTITY) / "samples.parquet").write_text("left over")
    store.write(IDENTITY, {"metrics": {"x": 0.5}}, ROWS)
    assert store.load(IDENTITY)["metrics"] == {"x": 0.5}


def test_what_a_killed_process_left_half_written_is_no_record_and_goes(tmp_path):
    store = Store(tmp_path)
    folder = store.write(IDENTITY, {"metrics": {}}, ROWS)
    left = tmp_path / "runs" / ".writing" / f"{digest(IDENTITY)[:12]}killed"
    os.rename(folder, left)
    assert store.records() == []
    store.write(IDENTITY, {"metrics": {}}, ROWS)
    assert not left.exists()


def test_the_answers_of_a_cell_go_when_it_is_written(tmp_path):
    store = Store(tmp_path)
    other = IDENTITY | {"seed": 1}
    for path in (store.answers(IDENTITY), store.answers(IDENTITY, "-0of2"), store.answers(other)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert store.all_answers(IDENTITY) == [
        store.answers(IDENTITY, "-0of2"),
        store.answers(IDENTITY),
    ]
    store.write(IDENTITY, {"metrics": {}}, ROWS)
    assert store.all_answers(IDENTITY) == []
    assert store.all_answers(other)
