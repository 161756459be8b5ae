"""Records of several machines in one folder: intact ones that agree; none is overwritten."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from cells import ENVIRONMENT, cell, changed, identity, rows, save

from scripts.merge_results import merge, warnings
from secateur.records import digest
from secateur.store import Store

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "merge_results.py"


def write(
    results: Path,
    method: str,
    task: str = "gqa",
    share: float = 0.5,
    seconds: float = 1.0,
    changes: dict | None = None,
) -> Path:
    budget = "full" if method == "none" else "64"
    own = cell("llava_1_5_7b", method, budget, task, rows(task, share, 40), 64.0)
    samples = own.rows.assign(
        kept_indices=[[[doc, 3]] for doc in own.rows["doc_id"]], seconds=seconds
    )
    (own,) = changed([own._replace(rows=samples)], {"seconds": seconds} | (changes or {}))
    return save(results, own)


def contents(results: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(results)): path.read_bytes()
        for path in results.rglob("*")
        if path.is_file()
    }


def run(monkeypatch, capsys, *words) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr()
    return ended.value.code, " ".join((printed.out + printed.err).split())


def test_cells_arrive_byte_for_byte_and_each_source_is_accounted_for(tmp_path, monkeypatch, capsys):
    a, b, here = tmp_path / "a", tmp_path / "b", tmp_path / "here"
    write(a, "none"), write(a, "scope"), write(b, "random"), write(here, "none", seconds=2.0)
    shutil.copytree(a / "runs", b / "runs", dirs_exist_ok=True)
    kept = contents(here)
    code, printed = run(monkeypatch, capsys, a, b, "--into", here)
    assert code == 0
    # of a: scope is new, none was run here too with the same answers; of b: random is new, scope
    # came from a
    assert f"{a} 1 0 1 0 0 0 {b} 1 1 1 0 0 0" in printed
    assert "MIXED" not in printed
    arrived = contents(here)
    assert {name: arrived[name] for name in kept} == kept
    records = [name for name in arrived if name.endswith(("record.json", "samples.parquet"))]
    assert len(records) == 6
    sent = contents(a) | contents(b)
    assert all(arrived[name] == sent[name] for name in records if name not in kept)
    assert {record.identity.pruner.name for record in Store(here).records()} == {
        "none",
        "scope",
        "random",
    }
    assert not list((here / "runs" / ".writing").iterdir())
    code, printed = run(monkeypatch, capsys, a, b, "--into", here)
    assert (code, contents(here)) == (0, arrived)
    assert f"{a} 0 1 1 0 0 0 {b} 0 2 1 0 0 0" in printed


def test_what_was_changed_or_torn_is_refused_and_the_rest_arrives(tmp_path, monkeypatch, capsys):
    source, here = tmp_path / "source", tmp_path / "here"
    edited, torn, rows_changed = (
        write(source, "scope"),
        write(source, "random"),
        write(source, "uniform"),
    )
    write(source, "none")
    (edited / "record.json").write_text(
        (edited / "record.json").read_text().replace('"exact_match": 0.5', '"exact_match": 0.9')
    )
    (torn / "record.json").unlink()
    samples = pd.read_parquet(rows_changed / "samples.parquet")
    samples.assign(score=1.0).to_parquet(rows_changed / "samples.parquet", index=False)
    code, printed = run(monkeypatch, capsys, source, "--into", here)
    assert code == 1
    assert f"{source} 1 0 0 3 0 0" in printed
    assert f"REFUSED the record in {edited} was changed after it was written" in printed
    assert f"REFUSED the record in {torn} is damaged" in printed
    assert f"REFUSED the record in {rows_changed} was changed after it was written" in printed
    assert [record.identity.pruner.name for record in Store(here).records()] == ["none"]


def test_the_same_cell_with_other_answers_is_refused_and_what_is_here_stays(tmp_path):
    source, here = tmp_path / "source", tmp_path / "here"
    write(source, "scope", share=0.75), write(here, "scope", share=0.5)
    before = contents(here)
    found = merge(source, Store(here))
    assert len(found.refused) == 1
    assert "other content (10 of 40 documents)" in found.refused[0]
    after = contents(here)
    assert {name: after[name] for name in before} == before


def test_a_record_that_lies_about_its_identity_is_refused(tmp_path):
    source, here = tmp_path / "source", tmp_path / "here"
    folder = write(source, "scope")
    # an identity exchanged and sealed anew: whole in itself, and not what its place says
    record = json.loads((folder / "record.json").read_text())
    record["identity"]["seed"] = 7
    sealed = {key: value for key, value in record.items() if key != "seal"}
    (folder / "record.json").write_text(json.dumps(sealed | {"seal": digest(sealed)}))
    found = merge(source, Store(here))
    assert len(found.refused) == 1
    assert "is that of another cell" in found.refused[0]
    del record["identity"]["pruner"]
    sealed = {key: value for key, value in record.items() if key != "seal"}
    (folder / "record.json").write_text(json.dumps(sealed | {"seal": digest(sealed)}))
    assert "identity.pruner: Field required" in merge(source, Store(here)).refused[0]
    assert not Store(here).records()


def test_a_damaged_cell_here_is_not_replaced(tmp_path, monkeypatch, capsys):
    source, here = tmp_path / "source", tmp_path / "here"
    write(source, "scope"), write(source, "none")
    for method, name in (("scope", "record.json"), ("none", "samples.parquet")):
        folder = write(here, method)
        (folder / name).unlink()
    before = {name: data for name, data in contents(here).items() if ".locks" not in name}
    code, printed = run(monkeypatch, capsys, source, "--into", here)
    assert code == 1
    assert "an incomplete cell is in its place" in printed
    assert "REFUSED already here: the record in" in printed
    assert {name: data for name, data in contents(here).items() if ".locks" not in name} == before


def test_unfinished_and_failed_cells_stay_where_they_are_and_are_counted(
    tmp_path, monkeypatch, capsys
):
    source, here = tmp_path / "source", tmp_path / "here"
    write(source, "none")
    own = Store(source).cell(identity("llava_1_5_7b", "scope", "64", "gqa"))
    own.write_failure("Traceback", ENVIRONMENT, {})
    for part in ("-0of2", "-1of2"):
        own.answers_file(part).write_text("{}\n")
    code, printed = run(monkeypatch, capsys, source, "--into", here)
    assert code == 0
    assert f"{source} 1 0 0 0 1 1" in printed
    assert "failed or are unfinished there were not merged" in printed
    assert not [name for name in contents(here) if "answers" in name or "failed" in name]


def test_a_cell_that_a_sweep_is_at_is_refused(tmp_path):
    source, here = tmp_path / "source", tmp_path / "here"
    write(source, "scope")
    own = identity("llava_1_5_7b", "scope", "64", "gqa")
    with Store(here).cell(own).claim() as mine:
        assert mine
        assert "a sweep is running this cell" in merge(source, Store(here)).refused[0]
    assert merge(source, Store(here)).counts["new"] == 1


def test_versions_that_tables_mark_or_leave_out_are_reported(tmp_path, monkeypatch, capsys):
    source, here = tmp_path / "source", tmp_path / "here"
    write(here, "none"), write(here, "scope")
    newer = {"started": "2026-02-01T00:00:00Z"}
    write(source, "scope", changes=newer | {"identity.pruner.source": "t"})
    write(source, "random", changes={"identity.versions": {"secateur": "0.2.0"}})
    code, printed = run(monkeypatch, capsys, source, "--into", here)
    assert code == 0
    assert "Cells differ in packages: 2 of secateur 0.1.0 and 1 of secateur 0.2.0." in printed
    assert "OLDER runs/hub/llava_1_5_7b/gqa/scope_64_" in printed
    assert "of 2026-01-01T00:00:00Z: method's code differs" in printed
    assert len(warnings(Store(here))) == 2


@pytest.mark.parametrize(
    ("words", "text"), [(["nowhere"], "has no runs/"), (["here"], "is the folder to merge into")]
)
def test_folders_that_make_no_sense_are_refused(tmp_path, monkeypatch, capsys, words, text):
    write(tmp_path / "here", "none")
    code, printed = run(
        monkeypatch, capsys, *(tmp_path / word for word in words), "--into", tmp_path / "here"
    )
    assert code == 2
    assert text in printed
