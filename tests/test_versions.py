"""Versions of a cell: the newest is shown, the older are listed, mixtures are named."""

import runpy
import sys
from pathlib import Path

import pytest
from cells import cell, changed, rows, save

from secateur.reporting.comparison import compare, load
from secateur.reporting.interval_table import markdown
from secateur.reporting.tables import stems
from secateur.reporting.versions import mixtures, newest

MODEL = "llava_1_5_7b"
SCRIPT = Path(__file__).parents[1] / "scripts" / "stale_cells.py"
CELLS = [
    cell(MODEL, "none", "full", "gqa", rows("gqa", 0.8, 400), 576.0),
    cell(MODEL, "scope", "64", "gqa", rows("gqa", 0.7, 400), 64.0),
]
LATER = {"started": "2026-02-01T00:00:00Z"}
CHANGES = {
    "code": {"identity.code": "abc"},
    "method's code": {"identity.pruner.source": "t"},
    "packages": {"identity.versions": {"secateur": "0.2.0"}},
    "weights": {"identity.model.weights": "other"},
    "data": {"identity.data": "f" * 40},
}


def later(what: str):
    return changed(CELLS[1:], CHANGES[what] | LATER)


@pytest.mark.parametrize("what", CHANGES)
def test_tables_show_the_newest_version_and_list_the_older(tmp_path, what):
    for one in [*CELLS, *later(what)]:
        save(tmp_path, one)
    stale = []
    shown = load(tmp_path, stale=stale)
    assert sorted(one.record.started for one in shown) == [
        "2026-01-01T00:00:00Z",
        "2026-02-01T00:00:00Z",
    ]
    (old,) = stale
    assert str(old) == (
        f"runs/{CELLS[1].record.identity.folder} of 2026-01-01T00:00:00Z: {what} differs"
    )


@pytest.mark.parametrize("change", [{"identity.pruner.alpha": 2.0}, {"identity.budget": "128"}])
def test_other_settings_are_no_versions(change):
    records = [one.record for one in [*CELLS, *changed(CELLS[1:], change | LATER)]]
    assert newest(records) == (records, [])


@pytest.mark.parametrize("what", CHANGES)
def test_cells_of_several_versions_share_a_table_that_says_so(what):
    cells = [CELLS[0], *later(what)]
    compared = compare(cells, 200)
    marks = compared.set_index("method")["mark"]
    text = markdown(cells, compared)
    if what == "method's code":  # the unpruned model has none
        assert marks["scope"] == ""
        assert mixtures([one.record for one in cells]) == []
    else:
        assert marks["scope"] == f"other {what} than the unpruned cell"
        part = " (gqa)" * (what == "data")
        assert f"- Cells differ in {what}{part}: 1 of " in text
    assert compared["low"].notna().all(), "marked, not refused"


def test_two_versions_of_a_method_in_one_table_are_named():
    twin = cell(MODEL, "scope", "128", "gqa", rows("gqa", 0.75, 400), 128.0)
    records = [one.record for one in [*later("method's code"), twin]]
    assert mixtures(records) == ["Cells differ in method's code (scope): 1 of t and 1 of s."]


def test_settings_that_share_a_name_get_files_of_their_own():
    other = changed(CELLS[:1], {"identity.seed": 1})[0]
    third = changed(CELLS[:1], {"identity.limit": 100})[0]
    names = stems([[CELLS[0].record], [other.record], [third.record]])
    assert len(set(names)) == 3
    assert names[0].startswith("hub_llava_1_5_7b_all_")
    assert names[2] == "hub_llava_1_5_7b_100"


def test_the_script_lists_stale_cells_and_removes_them_on_request(tmp_path, monkeypatch, capsys):
    for one in [*CELLS, *later("code")]:
        save(tmp_path, one)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["stale_cells.py", "--results", str(tmp_path), *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert ended.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    old = tmp_path / "runs" / CELLS[1].record.identity.folder
    assert "1 stale cells found" in run()
    assert old.exists()
    assert "1 stale cells removed" in run("--delete")
    assert not old.exists()
    assert "0 stale cells found" in run()
    assert len(load(tmp_path)) == 2
