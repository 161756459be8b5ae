"""Records are whole or absent, and a change behind our back is noticed."""

import json

import pandas as pd
import pytest

from eval.store import DamagedRecord, Store, digest

IDENTITY = {
    "model": {"name": "m"},
    "suite": {"name": "s"},
    "task": "pope",
    "pruner": {"name": "scope", "alpha": 1.0},
    "budget": "11.1%",
}
ROWS = pd.DataFrame({"doc_id": [0, 1], "score": [1.0, 0.0], "kept_indices": [[[0, 1]], [[2, 3]]]})


def test_a_cell_comes_back_as_it_was_written(tmp_path):
    store = Store(tmp_path)
    assert not store.has(IDENTITY)
    folder = store.write(IDENTITY, {"metrics": {"x": 0.5}}, ROWS)
    assert store.has(IDENTITY)
    assert store.load(IDENTITY)["metrics"] == {"x": 0.5}
    assert store.samples(folder)["score"].tolist() == [1.0, 0.0]
    assert [record["identity"] for record in store.records()] == [IDENTITY]
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
    (folder / "record.json").write_text(text)
    (folder / "samples.parquet").write_bytes((folder / "samples.parquet").read_bytes()[:-10])
    with pytest.raises(DamagedRecord):
        store.load(IDENTITY)


def test_a_failure_is_kept_and_forgotten_on_success(tmp_path):
    store = Store(tmp_path)
    path = store.write_failure(IDENTITY, "Traceback ...\nValueError: no", {"device": "cpu"}, {"seed": 0})
    assert store.failure(IDENTITY).endswith("ValueError: no")
    assert json.loads(path.read_text())["identity"] == IDENTITY
    store.write(IDENTITY, {"metrics": {}}, ROWS)
    assert store.failure(IDENTITY) is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="results="):
        Store(tmp_path / "file")
