"""Claims of abstracts: each gets the verdict that cells with known effects must give."""

import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
from cells import cell, changed, save
from printed import as_printed, samples

from secateur.paths import CONFIGS
from secateur.reporting import claims, claims_page
from secateur.reporting.claims import (
    CONTRADICTED,
    NOT_COMPARABLE,
    NOT_RUN,
    OPEN,
    SUPPORTED,
    UNDECIDED,
    Evidence,
)
from secateur.reporting.layouts import yaml

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = {claim.name: claim for claim in claims_page.load()}
NOTHING = Evidence()


def judge(name, cells=(), bench=None):
    return CLAIMS[name].judge(Evidence(cells, pd.DataFrame() if bench is None else bench, 200))


def pope(ratio):
    """Cells of the ratio of PromPrune's abstract, in percent."""
    found = []
    for method, budget, score in (("none", "full", 87.5), ("promprune", "320", 0.875 * ratio)):
        tokens = 2880.0 if budget == "full" else 320.0
        data = samples("pope", "pope_f1", score)
        found.append(cell("llava_next_7b", method, budget, "pope", data, tokens, 2880))
    return found


def test_without_cells_nothing_but_flops_is_judged():
    verdicts = {name: judge(name).verdict for name in CLAIMS}
    assert {name: verdict for name, verdict in verdicts.items() if verdict != NOT_RUN} == {
        "promprune_flops": SUPPORTED,
        "sppruner_flops": UNDECIDED,
        "sppruner_speed": OPEN,
    }
    assert judge("promprune_accuracy").cause == "none of the 2 cells was run"


def test_what_the_papers_own_tables_say():
    found = {name: claim.printed(NOTHING) for name, claim in CLAIMS.items()}
    assert {name for name, own in found.items() if own.supports is False} == {"scope_columns"}
    assert {name for name, own in found.items() if own.supports is None} == {
        *("sppruner_flops", "sppruner_accuracy", "sppruner_speed", "zspaprune_accuracy")
    }
    assert {name: own.text for name, own in found.items() if own.supports is not None} == {
        "promprune_flops": "Table 6: 5.02 of 42.6 T, 88.2 % fewer",
        "promprune_prefill": "Table 6: 516.3 to 402.7 ms, 22.0 % less",
        "promprune_accuracy": "Table 6: pope 85.3 of 87.5, 97.5 %",
        "prunesid_llava": "Table 1: average 96.3",
        "prunesid_next": "Table 2: average 92.8",
        "prunesid_advantage": "Table 2: averages 92.8 and 90.3",
        "prunesid_prefill": "Table 8: 218 to 27.8 ms, 7.8 times as fast",
        "scope_averages": "Table 1, Table 2: best in 6 of 6 averages",
        "scope_columns": "Table 1, Table 2: best in 31 of 42 columns",
    }


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (99.0, SUPPORTED),
        (97.5, SUPPORTED),
        (97.1, SUPPORTED),
        (96.3, UNDECIDED),
        (94.0, CONTRADICTED),
    ],
)
def test_a_ratio_is_judged_against_the_claimed_one(ratio, verdict):
    found = judge("promprune_accuracy", pope(ratio))
    assert found.verdict == verdict
    assert found.value.startswith(f"{ratio:.1f} ± ")
    assert found.value.endswith(" %")


def test_cells_with_other_inputs_are_not_comparable():
    cells = changed(pope(97.5), {"identity.model.resize": "torchvision"})
    found = judge("promprune_accuracy", cells)
    assert found.verdict == NOT_COMPARABLE
    assert found.cause == "none at full on pope and 1 more: resize is torchvision, not pil"


def test_cells_of_two_settings_are_no_evidence():
    cells = [*pope(97.5), *changed(pope(97.5)[1:], {"identity.seed": 1})]
    judged = claims_page.judge([CLAIMS["promprune_accuracy"]], Evidence(cells, resamples=200))
    assert judged[0].finding.verdict == NOT_COMPARABLE
    assert "cells of 2 settings" in judged[0].finding.cause
    assert judged[0].printed.supports


def test_a_missing_cell_is_named():
    found = judge("promprune_accuracy", pope(97.5)[:1])
    assert (found.verdict, found.cause) == (
        NOT_RUN,
        "1 of 2 cells are missing: promprune at 320 on pope",
    )


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, SUPPORTED), (-3.0, CONTRADICTED)])
def test_averages_are_judged_over_the_columns_that_have_cells(shift, verdict):
    cells = as_printed("prunesid_table2", {"160": ("prunesid", "visionzip")}, prunesid=shift)
    for name in ("prunesid_next", "prunesid_advantage"):
        found = judge(name, cells)
        assert found.verdict == verdict, name
        without = [text for text in ("vqav2", "seedbench_image") if claims.no_cell(text)]
        assert all(text in found.cause for text in without)
    cells = as_printed("prunesid_table1", {"64": ("prunesid_dyn",)}, prunesid_dyn=shift)
    assert judge("prunesid_llava", cells).verdict == verdict


def test_an_unpruned_model_that_is_off_leaves_a_claim_undecided():
    cells = as_printed("prunesid_table2", {"160": ("prunesid",)}, none=-6.0)
    found = judge("prunesid_next", cells)
    assert found.verdict == UNDECIDED
    assert "our unpruned model is off in gqa" in found.cause


@pytest.fixture(scope="module")
def scope_cells():
    return [*as_printed("scope_table1"), *as_printed("scope_table2")]


def test_being_the_best_is_judged_by_paired_differences(scope_cells):
    averages = judge("scope_averages", scope_cells)
    assert (averages.verdict, averages.value) == (SUPPORTED, "best in 6 of 6 averages")
    behind = [one for one in scope_cells if one.name != "visionzip"]
    some = judge("scope_averages", behind)
    assert some.verdict == NOT_RUN
    assert "visionzip at 192 on gqa (Table 1)" in some.cause
    assert some.value == "best in 0 of 6 averages"


def test_one_significant_difference_below_zero_contradicts_being_the_best():
    methods = {"192": ("fastv", "sparsevlm", "pyramiddrop", "visionzip", "scope")}
    cells = as_printed("scope_table1", methods, ["gqa", "scienceqa_img"])
    found = CLAIMS["scope_columns"].judge(Evidence(cells, resamples=500))
    assert found.verdict == CONTRADICTED
    assert found.cause == (
        "significantly below, in percent of the unpruned score: sparsevlm at 192 on scienceqa_img "
        "of Table 1 (-0.4), pyramiddrop at 192 on scienceqa_img of Table 1 (-2.0)"
    )
    assert found.value.startswith("best in 1 of ")


def retained(*ratios):
    """Cells of SPpruner's experiment at 192 and 128 tokens."""
    found = []
    for task in yaml(CONFIGS / "experiment/sppruner_llava.yaml")["tasks"]:
        metric = next(iter(claims.TASKS[task].metrics))
        highest = claims.TASKS[task].metrics[metric].highest
        rows = [("none", "full", 576.0, 100.0)]
        rows += [
            ("sppruner", *own) for own in zip(("192", "128"), (192.0, 128.0), ratios, strict=True)
        ]
        for method, budget, tokens, ratio in rows:
            data = samples(task, metric, 0.6 * highest * ratio / 100)
            found.append(cell("llava_1_5_7b", method, budget, task, data, tokens))
    return found


@pytest.mark.parametrize(
    ("ratios", "cause"),
    [
        ((99.9, 99.5), "as run: supported, sppruner at 192, sppruner at 128"),
        ((96.0, 95.0), "as run: contradicted, sppruner at 192, sppruner at 128"),
        ((99.9, 95.0), "sppruner at 192: supported; sppruner at 128: contradicted"),
    ],
)
def test_a_reconstruction_neither_supports_nor_contradicts(ratios, cause):
    found = judge("sppruner_accuracy", retained(*ratios))
    assert found.verdict == UNDECIDED
    assert found.cause.endswith(cause)


def bench(unpruned, own, device="NVIDIA A40", geometry="true"):
    """Samples of LLaVA-NeXT-7B with prefill times in ms; encoder and head take 100 ms."""
    found = []
    for number in range(30):
        noise = 1 + 0.001 * (number % 5)
        for kind, pruner, budget, prefill, selection in (
            ("unpruned", "none", 2880, unpruned, 0.0),
            ("pruned", "promprune", 320, own, 20.0),
            ("ceiling", "none", 320, own, 0.0),
        ):
            times = {"captures": 0.0, "selection": selection, "prefill": noise * prefill}
            place = {"model": "llava_next_7b", "kind": kind, "pruner": pruner, "budget": budget}
            first = {"first_token": 100 + sum(times.values()), "round": number}
            found.append(place | times | first | {"device": device, "geometry": geometry})
    return pd.DataFrame(found)


@pytest.mark.parametrize(
    ("times", "verdict"),
    [((500.0, 60.0), SUPPORTED), ((500.0, 490.0), CONTRADICTED), ((500.0, 375.0), UNDECIDED)],
)
def test_the_prefill_is_judged_in_three_readings(times, verdict):
    found = judge("promprune_prefill", bench=bench(*times))
    assert found.verdict == verdict
    assert all(
        f"{words}, NVIDIA A40" in found.value
        for words in ("LLM alone", "with the method", "up to the first token")
    )


def test_benchmarks_of_a_cpu_or_of_reduced_models_judge_nothing():
    for options in ({"device": "CPU AMD EPYC"}, {"geometry": "8 layers"}):
        assert judge("promprune_prefill", bench=bench(500.0, 60.0, **options)).verdict == NOT_RUN


def test_flops_are_counted_as_the_paper_counts():
    found = judge("promprune_flops")
    assert found.value == "88.2 % fewer"
    assert "(flops_prompt), the count that gives the printed FLOPs" in found.cause
    open_ones = judge("sppruner_flops")
    assert "192 tokens, 67.2 to 67.3 % fewer (macs_visual" in open_ones.cause
    assert open_ones.value == "57.6 to 78.3 % fewer"


def test_every_command_runs_cells_that_an_experiment_has():
    for claim in CLAIMS.values():
        for command in filter(None, claim.command(NOTHING).split("; ")):
            words = dict(word.strip("'").split("=", 1) for word in command.split() if "=" in word)
            name = words.get("experiment") or words.get("EXPERIMENT")
            if not name:
                assert command in ("make claims", "make bench-gpu")
                continue
            grid = yaml(CONFIGS / f"experiment/{name}.yaml")["hydra"]["sweeper"]["params"]
            if "budget" in words:
                assert set(words["budget"].split(",")) <= set(grid["budget"].split(","))
                known = {*grid["pruner"].replace(" ", "").split(","), "prunesid_dyn"}
                assert set(words["pruner"].split(",")) <= known


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "speed"}, "one: kind 'speed' is not one of advantage, best"),
        ({"kind": "open", "paper": "P"}, "one: .*missing 3 required"),
        ({"kind": "open", "colour": "red"}, "one: .*unexpected keyword argument 'colour'"),
    ],
)
def test_a_bad_entry_is_refused(tmp_path, entry, message):
    path = tmp_path / "claims.yaml"
    lines = "".join(f"  {key}: {value}\n" for key, value in entry.items())
    path.write_text(f"one:\n{lines}")
    with pytest.raises(ValueError, match=message):
        claims_page.load(path)


def test_the_script_prints_and_writes_the_page(tmp_path, monkeypatch, capsys):
    for one in pope(97.5):
        save(tmp_path, one)
    monkeypatch.setattr(
        sys, "argv", ["claims.py", "--results", str(tmp_path), "--resamples", "200"]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "claims.py"), run_name="__main__")
    page = (tmp_path / "claims.md").read_text()
    assert ended.value.code == 0
    assert page in capsys.readouterr().out
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(CLAIMS)
    assert sum(line.startswith("## ") for line in page.splitlines()) == len(CLAIMS)
    (row,) = (line for line in table if "keeps 97.5 %" in line)
    assert row.endswith("| supported |")
    assert "- Verdict: **supported**: over pope." in page
