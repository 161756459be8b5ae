"""Copied rows are one run, published pairs count once, and cells are compared by document."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cells import cell, rows, save

from secateur.reporting import compare, compare_cells, reported
from secateur.reporting.copies import runs

ROOT = Path(__file__).resolve().parents[1]
MODEL = "llava_1_5_7b"
TASKS = ("gqa", "textvqa", "vizwiz", "scienceqa_img")


def published(*tables):
    """Rows as of `load_reported`: (paper, method, scores of `TASKS`), at 64 tokens."""
    found = [
        {
            "paper": paper,
            "table": "Table 1",
            "model": MODEL,
            "method": method,
            "budget_tokens": 64,
            "retention_pct": 100.0 if method == "none" else 11.1,
            "task": task,
            "metric": "accuracy",
            "value": value,
            "suspect": False,
            "budget": "full" if method == "none" else "64",
        }
        for paper, method, scores in tables
        for task, value in zip(TASKS, scores, strict=False)
    ]
    return pd.DataFrame(found)


# Beta copies FastV from Alpha with one change; Gamma ran it again and has one score by chance
NUMBERS = published(
    ("Alpha", "none", (60.0, 50.0, 50.0, 70.0)),
    ("Alpha", "fastv", (45.0, 40.0, 30.0, 50.0)),
    ("Alpha", "alpha", (54.0, 45.0, 45.0, 63.0)),
    ("Beta", "none", (60.0, 50.0, 50.0, 70.0)),
    ("Beta", "fastv", (45.0, 40.0, 30.0, 51.0)),
    ("Beta", "alpha", (54.0, 45.0, 45.0, 63.0)),
    ("Beta", "beta", (57.0, 47.5, 47.5, 66.5)),
    ("Gamma", "none", (50.0, 50.0, 50.0, 50.0)),
    ("Gamma", "fastv", (45.0, 41.0, 31.0, 52.0)),
)


def test_mostly_equal_rows_are_one_run():
    found = runs(NUMBERS).xs("fastv", level="method").reset_index().set_index("paper")
    assert found.loc["Alpha", "run"] == found.loc["Beta", "run"] != found.loc["Gamma", "run"]
    assert found["origin"].to_dict() == {
        "Alpha": "as in Beta",
        "Beta": "as in Alpha",
        "Gamma": "run",
    }
    own = runs(NUMBERS).xs("alpha", level="method").reset_index().set_index("paper")["origin"]
    assert own.to_dict() == {"Alpha": "own", "Beta": "copied from Alpha"}


@pytest.mark.parametrize(("equal", "shared", "one"), [(2, 4, True), (1, 2, False), (1, 4, False)])
def test_a_single_equal_score_is_a_coincidence(equal, shared, one):
    scores = [40.0, 41.0, 42.0, 43.0][:shared]
    other = scores[:equal] + [score + 1 for score in scores[equal:]]
    found = runs(published(("Alpha", "fastv", scores), ("Beta", "fastv", other)))
    assert (found["run"].nunique() == 1) == one


def test_rows_of_one_paper_without_a_common_task_are_one_run():
    table = published(("Alpha", "fastv", (40.0, 41.0)))
    other = table.assign(table="Table 2", task=["mmvet", "seedbench"])
    assert runs(pd.concat([table, other], ignore_index=True))["run"].nunique() == 1
    changed = table.assign(table="Table 2", value=[39.0, 38.0])
    assert runs(pd.concat([table, changed], ignore_index=True))["run"].nunique() == 2


def test_kinds_of_equal_and_different_numbers():
    alike = reported.duplicates(NUMBERS).set_index(["method", "task"])
    assert alike.loc[("fastv", "textvqa"), "kind"] == "copied baseline"
    assert alike.loc[("fastv", "gqa"), ["kind", "papers"]].tolist() == ["copied baseline", 3]
    assert alike.loc[("none", "gqa"), "kind"] == "unpruned row"
    other = published(("Delta", "fastv", (12.0, 13.0, 14.0, 52.0)))
    alike = reported.duplicates(pd.concat([NUMBERS, other], ignore_index=True))
    assert alike.iloc[-1][["kind", "value"]].tolist() == ["coincidence", 52.0]

    different = reported.contradictions(NUMBERS).set_index(["method", "task"])
    assert different.loc[("fastv", "textvqa"), "kind"] == "separate runs"
    assert different.loc[("fastv", "textvqa"), "spread_percent"] == 2.5
    assert different.loc[("none", "gqa"), "kind"] == "unpruned row"
    copied = NUMBERS[NUMBERS["paper"] != "Gamma"]
    different = reported.contradictions(copied).set_index(["method", "task"])
    assert different["kind"].to_dict() == {("fastv", "scienceqa_img"): "copied with a change"}


def test_a_score_of_0_has_no_percentage_and_spoils_no_other():
    numbers = published(("Alpha", "fastv", (0.0, 40.0)), ("Beta", "fastv", (30.0, 41.0)))
    found = reported.contradictions(numbers).set_index("task")["spread_percent"]
    assert np.isnan(found["gqa"])
    assert found["textvqa"] == 2.5


def test_pairs_in_one_table_count_once_and_copies_with_them():
    scores = compare.scores_at(NUMBERS, MODEL, {"64"})
    found = compare.pairs(scores, "alpha", "fastv")
    inside = found[found["one_table"]]
    assert len(inside) == len(TASKS)
    assert set(inside["paper_a"]) == {"Alpha"}  # where its authors ran it
    assert set(inside["also"]) == {"Beta Table 1"}
    assert inside.set_index("task")["difference"].round(6).to_dict() == {
        "gqa": 15.0,
        "textvqa": 10.0,
        "vizwiz": 30.0,
        "scienceqa_img": pytest.approx(18.571429),
    }
    across = found[~found["one_table"]]
    assert set(across["paper_b"]) == {"Gamma"}  # the only run without a partner in its table
    assert across.set_index("task").loc["gqa", "difference"] == pytest.approx(90 - 90)

    total = compare.summary(found).set_index(["one_table", "task"])
    assert total.loc[(True, "gqa"), ["pairs", "a_higher"]].tolist() == [1, 1]
    assert total.loc[(True, "average"), "mean"] == pytest.approx(np.mean([15, 10, 30, 130 / 7]))
    assert total.loc[(False, "gqa"), "a_higher"] == 0


def test_the_summary_has_the_spread_over_runs():
    numbers = pd.concat(
        [NUMBERS, published(("Gamma", "alpha", (46.0, 45.5, 45.5, 63.5)))], ignore_index=True
    )
    found = compare.summary(
        compare.pairs(compare.scores_at(numbers, MODEL, {"64"}), "alpha", "fastv")
    )
    gqa = found[found["one_table"]].set_index("task").loc["gqa"]
    assert gqa[["pairs", "a_higher"]].tolist() == [2, 2]
    assert (gqa["lowest"], gqa["mean"], gqa["highest"]) == pytest.approx((2.0, 8.5, 15.0))


def test_suspect_numbers_and_tables_without_an_unpruned_score_stay_out_of_the_summary():
    numbers = NUMBERS.copy()
    numbers.loc[(numbers["method"] == "fastv") & (numbers["task"] == "gqa"), "suspect"] = True
    scores = compare.scores_at(numbers, MODEL, {"64"})
    total = compare.summary(compare.pairs(scores, "alpha", "fastv"))
    assert "gqa" not in set(total["task"])
    zero = NUMBERS.copy()
    zero.loc[(zero["method"] == "none") & (zero["task"] == "gqa"), "value"] = 0.0
    pairs = compare.pairs(compare.scores_at(zero, MODEL, {"64"}), "alpha", "fastv")
    assert pairs.loc[pairs["task"] == "gqa", "difference"].isna().all()
    assert pairs.loc[pairs["task"] != "gqa", "difference"].notna().all()


def test_numbers_in_other_metrics_are_no_pair_and_are_named():
    numbers = published(("Alpha", "none", (80.0,)), ("Alpha", "alpha", (70.0,)))
    numbers = numbers.assign(task="pope", metric="pope_f1")
    other = published(("Beta", "none", (80.0,)), ("Beta", "fastv", (70.0,)))
    other = other.assign(task="pope", metric="pope_as_printed")
    scores = compare.scores_at(pd.concat([numbers, other], ignore_index=True), MODEL, {"64"})
    assert compare.pairs(scores, "alpha", "fastv").empty
    assert compare.other_metrics(scores, "alpha", "fastv").to_dict("records") == [
        {"task": "pope", "metrics": "pope_as_printed and pope_f1", "pairs": 1}
    ]


def test_the_matrix_holds_every_pair_that_a_table_prints():
    found = compare.matrix(compare.scores_at(NUMBERS, MODEL, {"64"}))
    assert set(found.index) == {
        (a, b) for a in ("alpha", "beta", "fastv") for b in ("alpha", "beta", "fastv") if a != b
    }
    assert found.loc[("beta", "alpha"), "difference"] == pytest.approx(5)
    assert found.loc[("alpha", "beta"), "difference"] == pytest.approx(-5)
    assert found.loc[("alpha", "fastv"), "runs"] == 1


def test_every_budget_of_the_published_numbers_is_found_as_it_is_written():
    numbers = reported.load_reported()
    assert compare.spellings(numbers, [], MODEL, "11.1%") == {"64", "11.1%"}
    assert compare.usual_budget(numbers, [], MODEL) == "64"
    assert "128/tile" in compare.spellings(numbers, [], "llava_next_7b", "640")
    with pytest.raises(ValueError, match="budgets: 32, 64, 128, 192"):
        compare.spellings(numbers, [], MODEL, "63")


@pytest.mark.parametrize(
    ("name", "message"),
    [("divprun", "the nearest: divprune"), ("scopes", "the nearest: scope"), ("?", "known: alpha")],
)
def test_an_unknown_name_has_its_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        compare.known(name, ["alpha", "divprune", "scope"], "method")


def ours(**methods):
    """Cells of LLaVA-1.5-7B at 64 tokens: method -> share of right answers, by task."""
    found = []
    for task in ("gqa", "pope"):
        found.append(cell(MODEL, "none", "full", task, rows(task, 0.8), 576))
        found += [
            cell(MODEL, method, "64", task, rows(task, share), 64)
            for method, share in methods.items()
        ]
    return found


def test_cells_are_compared_on_the_same_documents():
    found = compare_cells.measured(
        ours(scope=0.7, divprune=0.6), "scope", "divprune", MODEL, {"64"}, 300
    )
    found = found.set_index("task")
    assert found.loc["gqa", ["a", "b"]].tolist() == pytest.approx([70, 60])
    assert found.loc["gqa", "difference"] == pytest.approx(10)
    assert 0 < found.loc["gqa", "low"] < 10 < found.loc["gqa", "high"]
    assert found.loc["average", "difference"] > 0
    assert found.loc["average", "note"] == "2 tasks, in percent of the unpruned score"


def test_without_a_baseline_there_is_a_difference_and_no_average():
    cells = [one for one in ours(scope=0.7, divprune=0.6) if one.name != "none"]
    found = compare_cells.measured(cells, "scope", "divprune", MODEL, {"64"}, 300)
    assert found["task"].tolist() == ["gqa", "pope"]
    assert found["low"].notna().all()
    with pytest.raises(ValueError, match="run it with pruner=none"):
        compare_cells.measured_matrix(cells, {"64"}, 300)


def test_a_variant_of_the_tables_is_its_method_with_those_fields():
    plain = cell(MODEL, "prunesid", "64", "gqa", rows("gqa", 0.7), 64)
    eight = cell(MODEL, "prunesid", "64", "gqa", rows("gqa", 0.6), 64, groups=8)
    found = compare_cells.measured([plain, eight], "prunesid", "prunesid_k=8", MODEL, {"64"}, 300)
    assert found["difference"].tolist() == pytest.approx([10])
    assert compare_cells.measured([eight], "prunesid", "prunesid_k=8", MODEL, {"64"}, 300).empty


def test_seeds_of_a_method_are_averaged():
    shares = {0: 0.6, 1: 0.5, 2: 0.4}
    randoms = [
        cell(MODEL, "random", "64", task, rows(task, share), 64, seed=seed)
        for task in ("gqa", "pope")
        for seed, share in shares.items()
    ]
    cells = [*ours(scope=0.7), *randoms]
    found = compare_cells.measured(cells, "scope", "random", MODEL, {"64"}, 300).set_index("task")
    assert found.loc["gqa", ["a", "b", "difference"]].tolist() == pytest.approx([70, 50, 20])
    assert found.loc["gqa", "note"] == "3 seeds of random"
    assert found.loc["average", "difference"] == pytest.approx(25)
    matrix = compare_cells.measured_matrix(cells, {"64"}, 300)
    assert set(matrix.index) == {("scope", "random"), ("random", "scope")}
    assert matrix.loc[("scope", "random"), "difference"] == pytest.approx(25)


def test_cells_of_two_budgets_are_not_mixed():
    cells = [*ours(scope=0.7), cell(MODEL, "scope", "11.1%", "gqa", rows("gqa", 0.6), 64)]
    found = compare_cells.measured(cells, "scope", "none", MODEL, {"64", "11.1%", "full"}, 300)
    assert found.set_index("task").loc["gqa", "note"] == (
        "scope has cells at 11.1% and 64; give one of them as the budget"
    )


def test_other_token_numbers_and_few_images_are_noted():
    one = cell(MODEL, "scope", "64", "gqa", rows("gqa", 0.7, documents=300), 64)
    other = cell(MODEL, "divprune", "64", "gqa", rows("gqa", 0.6, documents=300), 80)
    found = compare_cells.measured([one, other], "scope", "divprune", MODEL, {"64"}, 300)
    assert found["note"].tolist() == [
        "64.0 and 80.0 tokens per prompt; 30 images: the interval is too short"
    ]


def test_the_matrix_of_cells_is_over_the_tasks_that_all_ran():
    found = compare_cells.measured_matrix(ours(scope=0.7, divprune=0.6), {"64"}, 300)
    assert found.loc[("scope", "divprune"), "difference"] == pytest.approx(
        -found.loc[("divprune", "scope"), "difference"]
    )
    assert found.loc[("scope", "divprune"), "low"] > 0
    assert set(found["tasks"]) == {2}


def run(monkeypatch, capsys, results, *words):
    monkeypatch.setattr(
        sys, "argv", ["compare.py", "--results", str(results), "--resamples", "200", *words]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "compare.py"), run_name="__main__")
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_the_script_answers_which_is_better(tmp_path, monkeypatch, capsys):
    for one in ours(scope=0.7, divprune=0.6):
        save(tmp_path, one)
    words = ("--a", "SCOPE", "--b", "divprune", "--budget", "64")
    code, out, _ = run(monkeypatch, capsys, tmp_path, *words)
    assert code == 0
    assert "scope against divprune, llava_1_5_7b at budget 64" in out
    assert "No table prints both methods" in out
    assert "58.3 of 61.9 (94.2 %)" in out
    assert "scope minus divprune across tables" in out
    assert "Our cells, suite hub, model llava_1_5_7b" in out
    assert "+10.0" in out

    code, out, _ = run(monkeypatch, capsys, tmp_path)
    assert code == 0
    assert "All methods, llava_1_5_7b at budget 64" in out
    assert "*: the 95 % interval of the paired difference does not hold 0." in out


def test_the_script_names_what_is_missing(tmp_path, monkeypatch, capsys):
    words = ("--a", "scope", "--b", "mustdrop", "--model", "llava_next_7b")
    code, out, _ = run(monkeypatch, capsys, tmp_path, *words)
    assert code == 0
    assert "is published for these. Published:" in out
    assert "No method of this project: mustdrop." in out
    code, out, _ = run(monkeypatch, capsys, tmp_path, "--a", "scope", "--b", "divprune")
    assert "pruner=none,scope,divprune budget=" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--a", "scope"), "give two methods"),
        (("--a", "scope", "--b", "Scope"), "A and B are both scope"),
        (("--a", "scope", "--b", "divprun"), "the nearest: divprune"),
        (("--model", "llava"), "model 'llava' is not known"),
        (("--model", "shapes_llava"), "no number of shapes_llava is published"),
        (("--budget", "63"), "budgets: 32, 64"),
    ],
)
def test_the_script_refuses_what_it_cannot_compare(tmp_path, monkeypatch, capsys, words, message):
    code, _, errors = run(monkeypatch, capsys, tmp_path, *words)
    assert code == 2
    assert message in " ".join(errors.split())
