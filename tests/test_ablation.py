"""Fields that a sweep varies, seeds in every output, and figures of the score against a field."""

import re

import pytest
from cells import cell, rows
from stored import FULL, Pictures, grid, store

from secateur.reporting import ablation, figures, images
from secateur.reporting.comparison import compare, load
from secateur.reporting.costs import first_token_flops
from secateur.reporting.interval_table import markdown
from secateur.reporting.report import Report
from secateur.reporting.seeds import row_names
from secateur.reporting.tables import accuracy

OPTIONS = {"suite": "shapes", "limit": 400, "full": FULL}
TASKS = ("pope", "gqa")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The unpruned model, random with three seeds, SCOPE with three values of alpha."""
    cells = grid(TASKS)
    for task in TASKS:
        for seed, share in enumerate((0.40, 0.45, 0.50)):
            own = rows(task, share, 400, seed)
            cells.append(cell("shapes_llava", "random", "16", task, own, 16, seed=seed, **OPTIONS))
        for alpha, share in ((0.5, 0.6), (1.0, 0.75), (2.0, 0.7)):
            own = rows(task, share, 400)
            cells.append(cell("shapes_llava", "scope", "16", task, own, 16, alpha=alpha, **OPTIONS))
    return store(tmp_path_factory.mktemp("results"), cells)


@pytest.fixture(scope="module")
def compared(results):
    cells = load(results)
    return cells, compare(cells, 500)


def test_seeds_share_a_row_in_every_output(compared):
    cells, table = compared
    gqa = table[table["task"] == "gqa"].set_index("method")
    assert gqa["seeds"].to_dict() == {
        "none": 1, "random": 3, "scope": 1, "scope alpha=0.5": 1, "scope alpha=2.0": 1
    }  # fmt: skip
    assert gqa.loc["random", "value"] == pytest.approx(45)
    assert gqa.loc["random", "sd"] == pytest.approx(5)
    assert gqa.loc["scope", "over_random"] == pytest.approx(30)
    average = table[table["task"] == "average"].set_index("method")
    assert average.loc["random", "sd"] > 0
    text = markdown(cells, table)
    assert re.search(r"\| random, 3 seeds +\| 16 +\| 16\.0 .* \(sd 5\.0\)", text)
    assert re.search(r"\| scope  .*\| \+\d+\.\d \[\+\d+\.\d, \+\d+\.\d\] ", text)
    scores = accuracy([own.record for own in cells]).set_index("method")
    assert scores.loc["random", "GQA"] == pytest.approx(45)
    assert scores.loc["random", "GQA sd"] == pytest.approx(5)
    over = scores.loc["scope", "relative %"] - scores.loc["random", "relative %"]
    assert scores.loc["scope", "over random"] == pytest.approx(over)
    costs = first_token_flops(cells).mean
    assert costs["gqa", "random", "16"] == 1e9 + 16e6
    assert not [key for key in costs.index if "seed" in key[1]]


def test_one_seed_that_is_not_the_default_keeps_its_name(compared):
    cells, _ = compared
    few = [own.record.identity for own in cells if own.name == "random" and own.seed == 2]
    assert row_names(few) == {"random seed=2": "random seed=2"}
    two = few + [own.record.identity for own in cells if own.name == "random" and own.seed == 1]
    assert set(row_names(two).values()) == {"random"}


def test_varied_fields_are_found_and_seeds_are_none(compared):
    cells, _ = compared
    (one,) = ablation.varied(own.record.identity for own in cells)
    assert one[:3] == ("scope", "alpha", "")
    assert one.rows == {0.5: "scope alpha=0.5", 1.0: "scope", 2.0: "scope alpha=2.0"}
    assert ablation.varied(own.record.identity for own in cells if own.name == "random") == []


def test_the_figure_draws_every_value_the_unpruned_model_and_the_default(compared, tmp_path):
    cells, table = compared
    (one,) = ablation.varied(own.record.identity for own in cells)
    panels = {
        panel.get_title(loc="left"): panel for panel in ablation.figure(one, table, "demo").axes
    }
    panel = panels["GQA"]
    drawn: dict[tuple, list] = {}
    for line in panel.lines:  # the ends of the intervals follow their values
        drawn.setdefault(tuple(line.get_xdata()), list(line.get_ydata()))
    assert drawn[0.5, 1.0, 2.0] == pytest.approx([60, 75, 70])
    assert [80, 80] in drawn.values()  # unpruned
    assert (1.0, 1.0) in drawn  # the default
    assert panel.get_xlabel() == "alpha"
    paths = ablation.write(one, table, "demo", tmp_path / "table")
    assert [path.name for path in paths] == ["table_scope_alpha.png", "table_scope_alpha.pdf"]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_values_that_are_no_numbers_stand_side_by_side(compared):
    _, table = compared
    one = ablation.Varied("scope", "combine", "", {"multiply": "scope", "add": "scope alpha=0.5"})
    panel = ablation.figure(one, table, "demo").axes[0]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["multiply", "add"]


def test_a_report_of_seeds_and_varied_fields(results, monkeypatch):
    monkeypatch.setattr(images, "Documents", Pictures)
    monkeypatch.setattr("secateur.reporting.report.published", lambda cells, resamples: [])
    (section,) = Report(results, 200, rivals=["scope", "random"]).sections
    assert "scope_alpha.png" in " ".join(str(chart.path.name) for chart in section.charts)
    assert set(section.counts["16"]["gqa"]) == {"scope", "random"}
    assert figures.UNPRUNED in {row["method"] for row in section.rows["gqa"]}
