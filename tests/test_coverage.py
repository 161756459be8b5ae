"""The count of numbers with a cell: matched by settings, with one reason for every other number."""

from pathlib import Path

import pandas as pd
import pytest

from secateur import experiments
from secateur.paths import ROOT
from secateur.reporting import coverage
from secateur.reporting.layouts import yaml
from secateur.reporting.reported import FOLDER
from secateur.reporting.variants import Variant

ROW = {
    "paper": "SCOPE",
    "table": "Table 1",
    "model": "llava_1_5_7b",
    "method": "scope",
    "budget": "64",
    "budget_tokens": 64,
    "retention_pct": 11.1,
    "task": "pope",
    "metric": "pope_f1",
}
CELL = coverage.Composed(
    "mine",
    "SCOPE",
    ("Table 1",),
    "llava_1_5_7b",
    "{}",
    Variant("scope"),
    "64",
    ("pope", "gqa"),
)


@pytest.fixture(scope="module")
def numbers() -> pd.DataFrame:
    return coverage.of_papers(ROOT / "results")


def covered(row, *cells):
    (found,) = coverage.cover(pd.DataFrame([ROW | row]), cells or [CELL]).to_dict("records")
    assert bool(found["experiment"]) != bool(found["reason"])
    return found["experiment"], found["reason"]


def test_a_number_has_the_cell_of_its_settings():
    assert covered({}) == ("mine", "")
    assert covered({}, CELL._replace(budget="11.1%")) == ("mine", "")
    crops = {"model": "llava_next_7b", "budget": "640", "budget_tokens": 640}
    per_crop = CELL._replace(model="llava_next_7b", budget="128/tile")
    assert covered(crops, per_crop) == ("mine", "")
    assert covered({"metric": "pope_as_printed"}) == ("mine", "")
    assert covered({"table": "Table 7"}) == ("mine", "")


@pytest.mark.parametrize(
    "row",
    [
        {"budget": "32", "budget_tokens": 32, "retention_pct": 5.6},
        {"task": "mme", "metric": "mme_total"},
    ],
)
def test_another_budget_or_task_is_another_cell(row):
    assert covered(row) == ("", f"{coverage.IN_NONE}: {row.get('task', 'pope')}")


@pytest.mark.parametrize(
    "other",
    [
        {"paper": "PruneSID"},
        {"model": "llava_1_5_13b"},
        {"method": Variant("scope", ("saliency=none",))},
    ],
)
def test_a_cell_of_other_settings_does_not_count(other):
    assert covered({}, CELL._replace(**other)) == ("", f"{coverage.IN_NONE}: pope")


def test_fields_make_the_row_of_an_ablation():
    row = {"method": "prunesid_k=8", "paper": "PruneSID", "table": "Table 6"}
    plain = CELL._replace(method=Variant("prunesid"), paper="PruneSID", tables=("Table 6",))
    groups = plain._replace(method=Variant("prunesid", ("groups=8",)))
    assert covered(row, plain)[0] == ""
    assert covered(row, plain, groups)[0] == "mine"


def test_the_input_of_a_table_is_that_of_the_experiments_that_name_it():
    other = CELL._replace(experiment="other", tables=("Table 2",), inputs='{"layout": "anyres"}')
    assert covered({"table": "Table 2"}, CELL, other)[0] == "other"
    elsewhere = other._replace(tasks=("gqa",))
    assert covered({"table": "Table 2"}, CELL, elsewhere) == ("", f"{coverage.IN_NONE}: pope")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"model": "mini_gemini_7b"}, "no model mini_gemini_7b: not in transformers"),
        ({"method": "unheard"}, "no method unheard"),
        ({"task": "mmvet", "metric": "accuracy"}, "no task mmvet: a judge model scores it"),
        ({"metric": "pope_recall"}, "no metric pope_recall of pope"),
    ],
)
def test_what_is_not_here_is_named(row, reason):
    assert covered(row) == ("", reason)


def test_an_average_follows_from_its_row():
    average = ROW | {"task": "average", "metric": "relative_average"}
    rows = pd.DataFrame([ROW, average, average | {"budget": "32"}, ROW | {"budget": "32"}])
    found = coverage.cover(rows.assign(retention_pct=float("nan")), [CELL])
    assert found["experiment"].tolist() == ["mine", "mine", "", ""]
    assert found["reason"].tolist()[2:] == [
        "average over columns without a cell: pope",
        f"{coverage.IN_NONE}: pope",
    ]


def test_cells_of_other_documents_are_counted_apart(monkeypatch):
    class Validation:
        other_documents = "papers print another split"

    found = coverage.cover(pd.DataFrame([ROW]), [CELL])
    monkeypatch.setitem(coverage.TASKS, "pope", Validation())
    told = "1 of them are of other documents than their cells, pope: papers print another split."
    assert told in coverage.page(found.assign(paper="SCOPE"))


def test_every_number_has_an_experiment_or_one_reason(numbers):
    assert len(numbers) == 2053
    assert ((numbers["experiment"] != "") ^ (numbers["reason"] != "")).all()
    missing = numbers[numbers["reason"].str.startswith(coverage.IN_NONE)]
    assert missing[["table", "model", "method", "budget", "task"]].to_dict("records") == []


def test_no_reason_outlives_its_gap(numbers):
    reasons = yaml(FOLDER / "reasons.yaml")
    cells = reasons.pop("cells")
    texts = [why for kind in reasons.values() for why in kind.values()]
    texts += [f"{cell['method']} at {cell['budget']}: {cell['why']}" for cell in cells]
    given = set(numbers["reason"])
    unused = [text for text in texts if not any(reason.endswith(text) for reason in given)]
    assert unused == []


def test_the_page_is_what_the_configs_give(numbers):
    page = (ROOT / "results" / "coverage.md").read_text()
    assert page == coverage.page(numbers), "run `make coverage`"
    assert coverage.summary(numbers).endswith(" of 2,053")


def test_a_job_is_composed_once_for_all_its_budgets(tmp_path: Path):
    jobs = experiments.jobs("promprune_table1_llm", tmp_path)
    assert [(job.pruner.name, str(job.budget)) for job in jobs] == [
        *(("fastv", "128"), ("fastv", "64"), ("sparsevlm", "128"), ("sparsevlm", "64")),
    ]
    assert {job.model.geometry for job in jobs} == {"pad"}
