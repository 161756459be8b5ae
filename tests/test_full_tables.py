"""Full-size cells of every column of three main tables: averages and verdicts as they must be."""

import numpy as np
import pytest
from printed import LAYOUTS, as_printed, numbers, stand_ins

from secateur.reporting import averages, paper_tables
from secateur.reporting.reported import AVERAGE
from secateur.tasks import TASKS

# SCOPE's table whole; of the others the rows at one budget
ROWS = {
    "scope_table1": None,
    "promprune_table1": {"64": ("fastv", "visionzip", "divprune", "promprune")},
    "prunesid_table1": {"64": ("visionzip", "divprune", "prunesid", "prunesid_dyn")},
}


def printed_average(layout, method, budget, columns):
    """The average of printed scores over some columns, by the formula of the table."""
    own = numbers(layout).set_index(["method", "budget", "task"]).sort_index()
    metrics = [own.loc[("none", "full", column), "metric"] for column in columns]
    scores = np.array([own.loc[(method, budget, column), "value"] for column in columns])
    base = np.array([own.loc[("none", "full", column), "value"] for column in columns])
    formula = averages.formula_of(layout.paper, layout.table)
    return averages.mean(formula, metrics, scores, base)


@pytest.mark.parametrize("stem", ROWS)
def test_every_column_was_run(monkeypatch, stem):
    layout = LAYOUTS[stem]
    stand_ins(monkeypatch, layout)
    cells = as_printed(stem, ROWS[stem])
    table = paper_tables.build(layout, numbers(layout), cells, 100)
    run = table.cells[table.cells["reproduced"].notna() & (table.cells["method"] != "none")]
    follows = averages.check(numbers(layout)).set_index(["method", "budget"])["follows"]
    for row in run.to_dict("records"):
        key = row["method"], row["budget"]
        suspect = row["suspect"] or (row["column"] == AVERAGE and not follows[key])
        expected = "not comparable" if suspect else "match"
        assert row["verdict"] == expected, row
        if row["column"] == AVERAGE:
            own = printed_average(layout, *key, layout.tasks)
            assert row["reproduced"] == pytest.approx(own, abs=0.05)
            assert row["low"] < row["reproduced"] < row["high"]
            if follows[key]:
                assert row["reproduced"] == pytest.approx(row["printed"], abs=0.2)
    assert set(run["column"]) == {*layout.tasks, AVERAGE, paper_tables.OVER_RUN}
    assert not any("is not recomputed" in note for note in table.notes)


@pytest.mark.parametrize("stem", ["promprune_table1", "prunesid_table1"])
def test_columns_that_have_no_task_are_named_and_left_out_on_both_sides(stem):
    layout = LAYOUTS[stem]
    rows = {"64": ("promprune", "prunesid", "fastv")}
    table = paper_tables.build(layout, numbers(layout), as_printed(stem, rows), 100)
    own = table.cells.set_index(["column", "method", "budget"]).sort_index()
    missing = [task for task in layout.tasks if task not in TASKS]
    named = ", ".join(missing)
    assert any(
        note.startswith(f"{layout.average} is not recomputed: no cells of {named}; no task here")
        for note in table.notes
    )
    method = layout.paper.lower()
    average = own.loc[(AVERAGE, method, "64")]
    assert average["verdict"] == "not run"
    assert average["cause"].endswith(f"missing: {named}")
    over = own.loc[(paper_tables.OVER_RUN, method, "64")]
    assert over["verdict"] == "match"
    assert over["reproduced"] == pytest.approx(over["printed"], abs=0.05)
