"""Tables: what is compared with what, and how it is labelled."""

import pandas as pd
import pytest
from cells import altered, cell, rows

from secateur.pruners import build
from secateur.records import MethodIdentity
from secateur.reporting import tables
from secateur.tasks import TASKS

RECONSTRUCTED = "sppruner (reconstruction)"


def record(
    task: str,
    pruner: str,
    budget: str,
    tokens: float,
    metrics: dict,
    limit: int | None = 60,
    **fields,
):
    own = cell(
        "shapes_llava",
        pruner,
        budget,
        task,
        rows(task, 0.5, 4),
        tokens,
        limit=limit,
        suite="shapes",
        **fields,
    )
    return altered(own.record, {"metrics": metrics})


UNPRUNED = [
    record("pope", "none", "full", 144, {"pope_f1_score": 0.8, "pope_accuracy": 0.9}),
    record("mme", "none", "full", 144, {"mme_total_score": 1000.0}),
]
RANDOM = [
    record("pope", "random", "16", 16, {"pope_f1_score": 0.4}, seed=0),
    record("mme", "random", "16", 16, {"mme_total_score": 750.0}, seed=0),
    record("pope", "random", "48", 48, {"pope_f1_score": 0.6}, seed=3),
]


def test_rows_are_relative_to_the_unpruned_model_and_ordered_by_budget():
    table = tables.accuracy(RANDOM + UNPRUNED)
    assert table["method"].tolist() == ["none", "random seed=3", "random"]
    assert table["POPE F1"].tolist() == pytest.approx([80, 60, 40])
    assert table["relative %"].tolist()[0] == 100
    assert table["relative %"].tolist()[2] == pytest.approx((50 + 75) / 2)
    assert pd.isna(table["relative %"][1])  # a task was not run: no mean over the others
    assert pd.isna(table["MME sum"][1])


def test_a_method_that_keeps_other_numbers_by_task_is_one_row():
    uneven = [
        record("pope", "random", "16", 16, {"pope_f1_score": 0.4}, seed=0),
        record("mme", "random", "16", 17, {"mme_total_score": 750.0}, seed=0),
        record("pope", "uniform", "16", 16.4, {"pope_f1_score": 0.2}),
        record("pope", "divprune", "16", 16.4, {"pope_f1_score": 0.3}),
    ]
    full = [UNPRUNED[0], record("mme", "none", "full", 10, {"mme_total_score": 1000.0})]
    table = tables.accuracy([*uneven, *full])
    assert table["method"].tolist() == ["none", "random", "divprune", "uniform"]
    assert table["tokens"].tolist() == [77, 16.5, 16.4, 16.4]
    assert table["relative %"].tolist()[:2] == [100, pytest.approx((50 + 75) / 2)]


def test_every_task_has_a_title_and_a_headline():
    headings = [task.heading() for task in TASKS.values()]
    assert len(set(headings)) == len(TASKS)
    assert TASKS["mme"].headline == "mme_total"


def test_a_task_in_which_the_unpruned_model_scores_0_spoils_no_average():
    zero = record("mme", "none", "full", 144, {"mme_total_score": 0.0})
    table = tables.accuracy([*RANDOM, UNPRUNED[0], zero])
    assert table["relative %"].tolist() == pytest.approx([100, 75, 50])
    nothing = record("pope", "none", "full", 144, {"pope_f1_score": 0.0})
    assert tables.accuracy([*RANDOM, nothing, zero])["relative %"].isna().all()


def test_without_an_unpruned_row_nothing_is_relative():
    assert "relative %" not in tables.accuracy(RANDOM)


@pytest.mark.parametrize(
    ("pruner", "label"),
    [
        (build("scope"), "scope"),
        (build("scope", alpha=2.0), "scope alpha=2.0"),
        (build("sppruner"), RECONSTRUCTED),
        (build("holov", bands=4), "holov bands=4 (secondary)"),
    ],
)
def test_labels_name_changed_fields_and_statuses_that_qualify_numbers(pruner, label):
    assert MethodIdentity.of(pruner).label == label


def test_a_field_that_a_method_got_later_counts_as_its_default():
    older = MethodIdentity(name="scope", status="official", source="x")
    assert older.label == "scope"
    assert older.changed({"alpha": 2.0}) == {"alpha": build("scope").alpha}
    newer = MethodIdentity(name="scope", status="official", source="x", alpha=2.0)
    assert newer.changed() == {"alpha": 2.0}
    assert newer.changed({"alpha": 2.0}) == {}


def test_other_limits_get_tables_of_their_own():
    groups = tables.by_setting(
        [*UNPRUNED, record("pope", "none", "full", 144, {"pope_f1_score": 0.7}, limit=10)]
    )
    assert sorted(len(group) for group in groups) == [1, 2]


def test_the_files_name_suite_model_limit_and_commit(tmp_path):
    markdown, csv = tables.write(RANDOM + UNPRUNED, tmp_path / "made" / "shapes.v2")
    text = markdown.read_text()
    assert "suite shapes, model shapes_llava, the first 60 documents per task, task seed 0" in text
    assert "commit abc" in text
    assert "| random seed=3 | 48 | 48.0 | 60.0 | - | - |" in text
    assert pd.read_csv(csv)["tokens"].tolist() == [144, 48, 16]


def test_answers_that_mean_nothing_stand_beside_the_score(tmp_path, capsys):
    assert not {"empty %", "unusable %", "cut off %"} & set(tables.accuracy(UNPRUNED))
    counted = {"unusable_answers": 1, "cut_off_answers": 2, "documents": 4}
    records = [*RANDOM, altered(UNPRUNED[0], counted), UNPRUNED[1]]
    table = tables.accuracy(records).set_index(["method", "budget"])
    assert table.loc[("none", "full"), "unusable %"] == pytest.approx(100 / 8)
    assert table.loc[("none", "full"), "cut off %"] == pytest.approx(100 / 4)
    assert table.loc[("random", "16"), "unusable %"] == 0
    assert "empty %" not in table
    markdown, csv = tables.write(records, tmp_path / "marked")
    text = markdown.read_text()
    assert "| none | full | 144.0 | 80.0† | 1000.0 | 100.0 | 12.5 | 25.0 |" in text
    assert "| random | 16 | 16.0 | 40.0 |" in text
    assert tables.NOTE in text
    assert pd.read_csv(csv)["POPE F1"].tolist() == [80, 60, 40]
    tables.show(records)
    printed = capsys.readouterr().out
    assert "80.0†" in printed
    assert "scoring reads nothing" in " ".join(printed.split())
