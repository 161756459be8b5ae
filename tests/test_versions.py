"""Versions of a cell: one is shown, the others are listed, mixtures are named."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from cells import altered, cell, changed, rows, save

from secateur import source
from secateur.pruners import build
from secateur.reporting import interval_table, tables
from secateur.reporting.comparison import compare, load
from secateur.reporting.interval_table import markdown
from secateur.reporting.tables import stems
from secateur.reporting.versions import left_out, mixtures, newest
from secateur.store import DamagedRecord

MODEL = "llava_1_5_7b"
SCRIPT = Path(__file__).parents[1] / "scripts" / "stale_cells.py"
CELLS = [
    cell(MODEL, "none", "full", "gqa", rows("gqa", 0.8, 600), 576.0),
    cell(MODEL, "scope", "64", "gqa", rows("gqa", 0.7, 600), 64.0),
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


@pytest.mark.parametrize("field", ["identity.pruner.alpha", "identity.model.generation"])
def test_a_field_that_an_old_record_lacks_counts_as_its_default(field):
    old = changed(CELLS[1:], {field: ...})[0].record
    new = changed(CELLS[1:], LATER)[0].record
    assert old.identity.setting == new.identity.setting
    shown, stale = newest([old, new])
    assert shown == [new]
    assert [one.record for one in stale] == [old]


def test_the_version_of_the_code_that_is_here_is_shown_even_if_it_is_older():
    """A method was edited, run, and the edit was taken back."""
    here = {"identity.code": source.code(), "identity.pruner.source": build("scope").code}
    (mine,) = changed(CELLS[1:], here)
    (edited,) = changed(CELLS[1:], here | {"identity.pruner.source": "edited"} | LATER)
    shown, stale = newest([mine.record, edited.record])
    assert shown == [mine.record]
    assert [one.record for one in stale] == [edited.record]


def test_a_field_that_the_class_no_longer_has_makes_another_cell():
    """The field `alpha` was once called `exponent`."""
    records = [
        altered(CELLS[1].record, {"identity.pruner.exponent": value} | LATER)
        for value in (0.0, 2.0)
    ]
    assert newest(records) == (records, [])
    assert records[0].identity.pruner.label == "scope exponent=0.0"


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
    twin = cell(MODEL, "scope", "128", "gqa", rows("gqa", 0.75, 600), 128.0)
    records = [one.record for one in [*later("method's code"), twin]]
    assert mixtures(records) == ["Cells differ in method's code (scope): 1 of t and 1 of s."]


def test_many_older_versions_are_counted():
    records = [
        altered(
            CELLS[1].record,
            {"started": f"2026-01-0{day}T00:00:00Z", "identity.code": f"code {day}"},
        )
        for day in range(1, 9)
    ]
    _, stale = newest(records)
    assert [len(left_out(stale[:number])) for number in (0, 1, 5, 7)] == [0, 2, 6, 6]
    assert left_out(stale)[-1].startswith("2 more versions are left out; ")


def test_settings_that_share_a_name_get_files_of_their_own():
    other = changed(CELLS[:1], {"identity.seed": 1})[0]
    third = changed(CELLS[:1], {"identity.limit": 100})[0]
    names = stems([[CELLS[0].record], [other.record], [third.record]])
    assert len(set(names)) == 3
    assert names[0].startswith("hub_llava_1_5_7b_all_")
    assert names[2] == "hub_llava_1_5_7b_100"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"identity.pruner.name": "gone"},
            "is of the method 'gone', which is not registered here; name the file that it is in: "
            "plugins=[path/to/it.py]",
        ),
        ({"identity.task": "gone"}, "is of the task 'gone', which is not known here"),
        ({"metrics": {"other": 1.0}}, "has no metric 'exact_match'"),
    ],
)
def test_records_of_another_installation_are_named_and_left_out(tmp_path, change, message):
    save(tmp_path, CELLS[0])
    folder = save(tmp_path, *changed(CELLS[1:], change))
    damaged = []
    assert [one.name for one in load(tmp_path, damaged)] == ["none"]
    assert damaged == [f"the record in {folder} {message}"]
    with pytest.raises(DamagedRecord, match=re.escape(message)):
        load(tmp_path)


def test_text_of_answers_and_commits_is_escaped(tmp_path):
    same = CELLS[1].rows.assign(answer="<script>")
    cells = changed([CELLS[0], CELLS[1]._replace(rows=same)], {"environment.commit": "<img>"})
    for path in interval_table.write(cells, compare(cells, 200), tmp_path / "table")[:1]:
        assert "every answer is '&lt;script&gt;'" in path.read_text()
        assert "commit &lt;img&gt;" in path.read_text()
    accuracy, _ = tables.write([one.record for one in cells], tmp_path / "accuracy")
    assert "commit &lt;img&gt;" in accuracy.read_text()


@pytest.mark.parametrize("script", ["tables", "report"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--results", "/nowhere"], "--results /nowhere: no such folder"),
        (["--resamples", "-1"], "argument --resamples: '-1' is no number of at least 1"),
    ],
)
def test_a_typo_is_refused_by_name(script, words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT.with_name(f"{script}.py")), run_name="__main__")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_in_the_way_of_the_tables_is_one_paragraph(tmp_path, monkeypatch):
    save(tmp_path, CELLS[0])
    (tmp_path / "tables").write_text("")
    said = []
    monkeypatch.setattr("secateur.progress.print_error", said.append)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--results", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT.with_name("tables.py")), run_name="__main__")
    assert ended.value.code == 1
    (text,) = said
    assert "Not a directory" in text or "File exists" in text
    assert "run it again" in text


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
