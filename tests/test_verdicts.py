"""Verdicts on simulated papers: no shift is taken for a match, no exact reproduction is blamed."""

import numpy as np
import pandas as pd
import pytest
from cells import cell, changed, rows, save

from scripts.verdict_power import table as power
from secateur.paths import CONFIGS, ROOT
from secateur.reporting import paper_tables, reported
from secateur.reporting.comparison import load
from secateur.reporting.layouts import layouts, rows_of, yaml
from secateur.reporting.verdicts import (
    MME_POINTS,
    POINTS,
    VERDICTS,
    Verdict,
    judge,
    judge_method,
    judge_unpruned,
    off_budget,
    over_readings,
    rounding,
    signs,
    with_open_budget,
)
from secateur.tasks import TASKS
from secateur.tasks.metrics import MME_PERCEPTION, MME_TOTAL, PERCEPTION

LAYOUTS = {layout.stem: layout for layout in layouts()}
NUMBERS = reported.load_reported()
# images of MME's categories, as the real data set has them
MME_IMAGES = {
    **dict.fromkeys(("existence", "count", "position", "color"), 30),
    "posters": 147,
    "celebrity": 170,
    **dict.fromkeys(("scene", "landmark", "artwork"), 200),
    "OCR": 20,
    "commonsense_reasoning": 70,
    **dict.fromkeys(("numerical_calculation", "text_translation", "code_reasoning"), 20),
}
# (layout, model, visual tokens of an image, the paper's own method)
PAPERS = {
    "scope_table1": ("llava_1_5_7b", 576, "scope"),
    "scope_table2": ("llava_next_7b", 2880, "scope"),
    "promprune_table1": ("llava_1_5_7b", 576, "promprune"),
    "promprune_table3": ("qwen2_5_vl_7b", 1296, "promprune"),
    "prunesid_table1": ("llava_1_5_7b", 576, "prunesid"),
    "prunesid_table2": ("llava_next_7b", 2880, "prunesid"),
    "prunesid_table12": ("qwen2_5_vl_7b", 1296, "prunesid"),
}


def mme_rows(score: float, metric: str) -> pd.DataFrame:
    """MME at full size with a score, to within a point and a half: whole pairs are right."""
    highest = TASKS["mme"].metrics[metric].highest
    frames = []
    for category, images in MME_IMAGES.items():
        right = np.arange(images) < round(score / highest * images)
        frames.append(pd.DataFrame({"category": category, "right": right}))
    frame = pd.concat(frames, ignore_index=True)
    points = 200 / frame["category"].map(MME_IMAGES)
    counted = frame["category"].isin(PERCEPTION) if metric == "mme_perception" else True
    left = score - (points * frame["right"] * counted).sum()
    adjusted = frame["category"].isin(["scene", "landmark"])  # a pair of them is one point
    pool = frame.index[adjusted & (frame["right"] != (left > 0))]
    frame.loc[pool[: round(abs(left))], "right"] = left > 0
    frame["image_id"] = frame["category"] + "/" + frame.index.astype(str)
    documents = frame.loc[frame.index.repeat(2)].reset_index(drop=True)
    targets = pd.Series(np.where(documents.index % 2, "no", "yes"))
    other = targets.map({"yes": "no", "no": "yes"})
    return documents.assign(
        doc_id=documents.index,
        target=targets,
        answer=targets.where(documents["right"], other),
        score=documents["right"].astype(float),
    ).drop(columns="right")


def samples(task: str, metric: str, score: float) -> pd.DataFrame:
    if task == "mme":
        return mme_rows(score, metric)
    return rows(task, score / 100, TASKS[task].documents)


def reproduce(folder, stem, tasks, shift, unpruned=None, methods=None):
    """A table from cells at the printed numbers plus `shift` by task, through the store."""
    layout, (model, full, own) = LAYOUTS[stem], PAPERS[stem]
    of = (NUMBERS["paper"] == layout.paper) & (NUMBERS["table"] == layout.table)
    printed = NUMBERS[of & (NUMBERS["model"] == layout.model)]
    experiment = yaml(CONFIGS / "experiment" / f"{layout.experiment}.yaml")
    inputs = {f"identity.model.{name}": value for name, value in experiment["model"].items()}
    for row in rows_of(layout, printed):
        if row.method not in (methods or ("none", own)):
            continue
        for one in printed[
            (printed["method"] == row.method)
            & (printed["budget"] == row.budget)
            & printed["task"].isin(tasks)
        ].itertuples():
            moved = (unpruned or {}) if row.method == "none" else shift
            score = one.value + moved.get(one.task, 0.0)
            made = cell(
                model,
                row.method,
                row.budget,
                one.task,
                samples(one.task, one.metric, score),
                full if row.keep is None else row.keep if row.keep > 1 else row.keep * full,
                full,
            )
            save(folder, *changed([made], inputs))
    return paper_tables.build(layout, NUMBERS, load(folder), 50)


def found(table, tasks, pruned=True):
    cells = table.cells[table.cells["column"].isin(tasks) & (table.cells["verdict"] != "not run")]
    return cells[(cells["method"] != "none") == pruned]


@pytest.mark.parametrize("stem", PAPERS)
@pytest.mark.parametrize(
    ("points", "mme", "verdict"),
    [(0.0, 0.0, "match"), (-1.5, -30.0, "close"), (-3.0, -60.0, "miss")],
)
def test_a_simulated_paper_gets_its_verdicts(tmp_path, stem, points, mme, verdict):
    tasks = [task for task in ("scienceqa_img", "mme", "mmmu_val") if task in LAYOUTS[stem].tasks]
    shift = {task: mme if task == "mme" else points for task in tasks}
    table = reproduce(tmp_path, stem, tasks, shift)
    pruned = found(table, tasks)
    comparable = pruned[pruned["verdict"] != "not comparable"]  # suspect in the source
    assert len(comparable) >= len(tasks)
    assert set(comparable["verdict"]) == {verdict}
    for task, rows_of_task in comparable.groupby("column"):
        assert rows_of_task["difference"].to_numpy() == pytest.approx(
            shift[task], abs=1.5 if task == "mme" else 0.06
        )
    assert set(found(table, tasks, pruned=False)["verdict"]) == {"match"}


def test_an_unpruned_row_that_misses_is_blamed_and_not_the_methods(tmp_path):
    """MMMU at 33.4 against 36.3, while the methods reproduce exactly."""
    off = {"mmmu_val": -0.08 * 36.3}
    table = reproduce(tmp_path, "prunesid_table1", ["mmmu_val", "scienceqa_img"], {}, off)
    mmmu = found(table, ["mmmu_val"])
    assert set(mmmu["verdict"]) == {"baseline off"}
    assert mmmu["cause"].str.contains(r"unpruned row -2\.9 points; by itself: match").all()
    assert found(table, ["mmmu_val"], pruned=False)["verdict"].tolist() == ["baseline off"]
    assert set(found(table, ["scienceqa_img"])["verdict"]) == {"match"}


def test_a_column_that_leans_to_one_side_is_said(tmp_path):
    """Ten points of MME lie inside the tolerance; fifteen rows below the print do not agree."""
    methods = {"none", *LAYOUTS["scope_table1"].methods}
    table = reproduce(tmp_path, "scope_table1", ["mme"], {"mme": -10.0}, methods=methods)
    assert found(table, ["mme"])["verdict"].tolist() == ["match"] * 15
    assert any("mme 15:0 (p = 6.1e-05)" in note for note in table.notes)
    assert (
        "1 of 1 tested columns lean to one side at 5 %; 0.04 are expected by chance." in table.notes
    )


def test_an_unpruned_score_of_0_is_no_baseline(tmp_path):
    tasks = ["gqa", "scienceqa_img", "mme"]
    table = reproduce(tmp_path, "scope_table1", tasks, {}, unpruned={"gqa": -61.9})
    assert set(found(table, ["gqa"])["verdict"]) == {"no baseline"}
    assert set(found(table, ["scienceqa_img"])["verdict"]) == {"match"}
    over = table.cells[table.cells["column"] == paper_tables.OVER_RUN]
    assert set(over["verdict"]) == {"match", "not run"}
    assert any("over scienceqa_img, mme" in note or "over mme, sc" in note for note in table.notes)
    numbers = table.cells.select_dtypes("number").to_numpy()
    assert not np.isinf(numbers).any()


@pytest.mark.parametrize(
    ("metric", "match", "close", "miss"),
    [
        ("accuracy", (0.0, 0.54, -0.55), (0.56, -2.0), (2.01, -3.0)),
        ("relative_average", (0.5,), (0.6,), (2.1,)),
        ("mme_total", (20.5, -20.5), (20.6, -40.0), (40.1, -60.0)),
    ],
)
def test_limits_of_the_verdicts(metric, match, close, miss):
    for verdict, differences in (("match", match), ("close", close), ("miss", miss)):
        for difference in differences:
            printed = 1862.0 if metric == "mme_total" else 50.0
            own = judge(printed, printed + difference, metric)
            assert own.verdict == verdict, difference
            assert own.difference == pytest.approx(difference)
            assert own.cause == (
                f"{own.difference:+.1f} {'MME ' if metric == 'mme_total' else ''}points"
            )


@pytest.mark.parametrize(
    ("layout", "budget", "before", "after", "message"),
    [
        ("fixed2880", "640", 2880, 640, ""),
        ("fixed2880", "640", 2304, 640, "layout: 2304 visual tokens per image, not 2880"),
        ("crops", "640", 2304, 640, ""),  # images of four crops
        ("crops", "640", 2304, 512, "budget: 512.0 visual tokens per image on average, not 640.0"),
        ("crops", "128/tile", 2304, 512, ""),
        ("crops", "128/tile", 2304, 640, "budget: 640.0 visual tokens per image on average, not"),
    ],
)
def test_printed_tokens_of_llava_next_are_those_of_five_crops(
    layout, budget, before, after, message
):
    one = cell("llava_next_7b", "scope", budget, "gqa", rows("gqa", 0.5, documents=20), after)
    (one,) = changed(
        [one],
        {
            "identity.model.layout": layout,
            "visual_tokens": float(before),
            "average_tokens": float(after),
        },
    )
    assert off_budget(one, 2880, 640.0).startswith(message)
    assert bool(off_budget(one, 2880, 640.0)) == bool(message)


def test_the_rounding_is_that_of_the_print():
    assert rounding(1862.0, "mme_total") == 0.5
    assert rounding(1422.4, "mme_perception") == rounding(62.0, "accuracy") == 0.05


def test_only_an_unpruned_miss_takes_the_baseline_away():
    assert judge_unpruned(36.3, 33.3, "accuracy") == Verdict(
        "baseline off", "-3.0 points", pytest.approx(-3.0)
    )
    near = judge_unpruned(36.3, 35.3, "accuracy")
    assert near.verdict == "close"
    assert judge_method(35.0, 35.0, "accuracy", near).verdict == "match"


def test_readings_decide_where_they_agree():
    near, far = judge(80.0, 80.1, "accuracy"), judge(80.0, 70.0, "accuracy")
    assert over_readings({"a": near, "b": near}) == near
    both = over_readings({"a": near, "b": far})
    assert both.verdict == "undecided"
    assert both.cause.endswith("as a: match, +0.1 points; as b: miss, -10.0 points")
    assert with_open_budget(far, "fastv", "64").verdict == "undecided"
    assert with_open_budget(near, "fastv", "64") == near
    assert with_open_budget(far, "scope", "64") == far


def test_too_few_rows_are_not_tested():
    assert signs({}) == []
    assert signs({"gqa": [-1.0, -2.0, -0.1]}) == [
        "Signs (ours below : above the print; sign test over the pruned rows): "
        "gqa 3:0 (too few rows for a test)."
    ]


def test_the_made_up_mme_has_the_score_it_is_asked_for():
    for metric, definition in (("mme_total", MME_TOTAL), ("mme_perception", MME_PERCEPTION)):
        for score in (900.0, 1450.0, 1862.0 if metric == "mme_total" else 1697.8):
            made = mme_rows(score, metric)
            assert len(made) == TASKS["mme"].documents
            assert definition.value(definition.terms(made).sum(axis=0)) == pytest.approx(
                score, abs=1.5
            )


def test_the_page_states_the_limits_and_the_simulated_table():
    page = (ROOT / "docs" / "VERDICTS.md").read_text()
    assert f"0.05 + {POINTS.run_to_run:g} points; MME 0.5 + {MME_POINTS.run_to_run:g} " in page
    assert f"at most {POINTS.close:g} points; MME {MME_POINTS.close:g} |" in page
    assert all(f"| {verdict} | " in page for verdict in VERDICTS)
    printed = page.split("<!-- power -->\n")[1].split("<!-- /power -->")[0].strip()
    assert printed == power().to_markdown(disable_numparse=True)


def test_no_large_deviation_matches_and_few_exact_ones_are_blamed():
    found = power(changed=0.25).map(lambda cell: [int(part) for part in cell.split(" / ")])
    assert found.iloc[0].map(lambda shares: shares[0] >= 95 and shares[2] == 0).all()
    assert found.iloc[-1].map(lambda shares: shares[0] == 0).all()  # -3 points, -60 of MME
    assert found.iloc[4].map(lambda shares: shares[0] <= 2).all()  # -2 points, -40 of MME
    assert found.iloc[3, :-1].map(lambda shares: shares[0] == 0).all()  # -1.5 points, without MME
