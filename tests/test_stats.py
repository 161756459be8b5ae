"""Intervals cover the truth, tests agree with hand calculation, bad samples are refused."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from secateur.reporting import stats
from secateur.reporting.stats import Estimates, Interval, estimate, flips, holm, resample
from secateur.tasks import TASKS
from secateur.tasks.metrics import PERCEPTION

SIMULATIONS = 1000


def official(task: str):
    """lmms-eval's own functions of a task, without importing the whole of it."""
    root = importlib.util.find_spec("lmms_eval").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(
        f"official_{task}", Path(root) / "tasks" / task / "utils.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def samples(right: np.ndarray, per_image: int = 1, categories: int = 1) -> pd.DataFrame:
    """Documents in order, `per_image` per image; categories and targets yes and no in turn."""
    docs = np.arange(len(right))
    targets = np.where(docs % 2, "no", "yes")
    return pd.DataFrame(
        {
            "doc_id": docs,
            "image_id": [f"image{doc // per_image}" for doc in docs],
            "category": [f"c{doc // per_image % categories}" for doc in docs],
            "target": targets,
            "answer": np.where(right, targets, np.where(docs % 2, "yes", "no")),
            "score": right.astype(float),
        }
    )


def drawn(seed: int, documents: int, p: float) -> np.ndarray:
    return np.random.default_rng(seed).random(documents) < p


# the metrics themselves


def test_pope_is_counted_as_in_lmms_eval():
    rows = samples(drawn(0, 300, 0.8), per_image=6)
    rows.loc[rows.index % 7 == 0, "answer"] = " Yes"
    rows.loc[rows.index % 11 == 0, ["answer", "score"]] = ["maybe", 0.0]
    results = [
        {"prediction": answer.lower().strip(), "ground_truth": target, "score": score}
        for answer, target, score in rows[["answer", "target", "score"]].itertuples(index=False)
    ]
    found = estimate("pope", "pope_f1", {"a": rows}, 20)
    assert found.values["a"] == pytest.approx(
        100 * official("pope").pope_aggregate_f1_score(results)
    )
    found = estimate("pope", "pope_accuracy", {"a": rows}, 20)
    assert found.values["a"] == pytest.approx(
        100 * official("pope").pope_aggregate_accuracy(results)
    )


def test_mme_is_summed_as_in_lmms_eval():
    rows = samples(drawn(1, 400, 0.7), per_image=2, categories=4)
    names = {"c0": "OCR", "c1": "count", "c2": "code_reasoning", "c3": "text_translation"}
    rows["image_id"] = rows["category"].map(names) + "/" + rows["image_id"]
    rows = rows.drop(columns="category")
    results = [
        {"question_id": image, "category": image.split("/")[0], "score": score}
        for image, score in rows[["image_id", "score"]].itertuples(index=False)
    ]
    mme = official("mme")
    assert set(mme.eval_type_dict["Perception"]) == PERCEPTION
    assert estimate("mme", "mme_total", {"a": rows}, 20).values["a"] == pytest.approx(
        mme.mme_aggregate_results(results)
    )
    perception = mme.mme_aggregate_results(
        [result for result in results if result["category"] in PERCEPTION]
    )
    assert estimate("mme", "mme_perception", {"a": rows}, 20).values["a"] == pytest.approx(
        perception
    )


def test_mmstar_is_the_mean_of_categories_as_in_lmms_eval():
    rows = samples(drawn(2, 90, 0.5), categories=4)
    rows.loc[rows.index % 3 == 0, "category"] = "c0"  # of unequal size
    results = [
        {"score": s, "l2_category": c}
        for s, c in rows[["score", "category"]].itertuples(index=False)
    ]
    found = estimate("mmstar", "accuracy", {"a": rows}, 20)
    assert found.values["a"] == pytest.approx(
        100 * official("mmstar").mmstar_aggregate_results(results)
    )


# intervals


def image_effects(rng: np.random.Generator, images: int, per_image: int) -> np.ndarray:
    """Probabilities [simulations, documents] of a right answer; images are easy or hard."""
    ease = rng.uniform(0.4, 0.9, (SIMULATIONS, images))
    return np.repeat(ease, per_image, axis=1)


def covered(truth: float, values: np.ndarray, draws: np.ndarray) -> float:
    """Share of the simulations whose interval holds the truth.

    Args:
        values: [simulations].
        draws: [resamples, simulations].
    """
    found = [Interval.of(value, draws[:, i]) for i, value in enumerate(values)]
    return float(np.mean([low <= truth <= high for _, low, high, _ in found]))


def test_intervals_of_paired_differences_cover_the_truth():
    rng = np.random.default_rng(3)
    p = image_effects(rng, 100, 4)
    first, second = rng.random(p.shape) < p, rng.random(p.shape) < p - 0.06
    scores = (
        np.stack([first, second]).astype(float).transpose(2, 1, 0)
    )  # [documents, simulations, 2]
    images = pd.Series(np.arange(400) // 4)
    sums = resample(scores, images, pd.Series("", index=images.index), 1000, 0)
    change = 100 * (scores[..., 1] - scores[..., 0]).mean(axis=0)
    assert 0.93 <= covered(-6.0, change, 100 * (sums[..., 1] - sums[..., 0]) / 400) <= 0.97


@pytest.mark.parametrize("images", [50, 100, 500])
def test_coverage_size_and_power_hold_at_any_number_of_images(images):
    """The interval of a difference, the test of it, and the difference that it detects."""
    rng = np.random.default_rng(images)
    simulations, questions = 3000, 4
    p = np.repeat(rng.uniform(0.4, 0.9, (simulations, images)), questions, axis=1)
    of = pd.Series(np.arange(images * questions) // questions)
    none = pd.Series("", index=of.index)

    def simulate(loss: float) -> tuple[np.ndarray, np.ndarray]:
        change = (rng.random(p.shape) < p - loss).astype(float) - (rng.random(p.shape) < p)
        return change.mean(axis=1), resample(change.T, of, none, 1000, 0) / p.shape[1]

    def rejected(change: np.ndarray, draws: np.ndarray) -> float:
        found = [Interval.of(value, draws[:, i]).p < 0.05 for i, value in enumerate(change)]
        return float(np.mean(found))

    def detectable(draws: np.ndarray) -> float:
        methods = pd.DataFrame({"none": 0.0} | {str(i): draws[:, i] for i in range(500)})
        found = Estimates(methods.iloc[0], methods, images - 1)
        return float(np.mean([found.detectable(str(i), "none") for i in range(500)]))

    change, draws = simulate(0.0)
    assert 0.93 <= covered(0.0, change, draws) <= 0.97
    assert rejected(change, draws) <= 0.07
    smallest = 0.0
    for _ in range(3):  # a larger difference has a larger spread
        change, draws = simulate(smallest)
        smallest = detectable(draws)
    assert 0.78 <= rejected(*simulate(smallest)) <= 0.82


def test_documents_are_not_independent_where_they_share_images():
    rng = np.random.default_rng(4)
    scores = (rng.random((SIMULATIONS, 400)) < image_effects(rng, 40, 10)).T.astype(float)
    documents, images = pd.Series(np.arange(400)), pd.Series(np.arange(400) // 10)
    none = pd.Series("", index=documents.index)
    values = 100 * scores.mean(axis=0)
    by_image, by_document = (
        100 * resample(scores, of, none, 1000, 0) / 400 for of in (images, documents)
    )
    assert 0.93 <= covered(65.0, values, by_image) <= 0.97
    assert covered(65.0, values, by_document) < 0.9


def test_intervals_of_f1_cover_the_truth():
    rng = np.random.default_rng(5)
    p = image_effects(rng, 100, 6)
    right, yes = rng.random(p.shape) < p, np.tile([True, False], 300)
    counted = (
        np.stack([right & yes, ~right & ~yes, ~right & yes], axis=-1)
        .astype(float)
        .transpose(1, 0, 2)
    )
    images = pd.Series(np.arange(600) // 6)
    f1 = TASKS["pope"].metrics["pope_f1"].value
    draws = f1(resample(counted, images, pd.Series("", index=images.index), 1000, 0))
    assert (
        0.93 <= covered(65.0, f1(counted.sum(axis=0)), draws) <= 0.97
    )  # tp .65, fp .35, fn .35: F1 .65


def test_intervals_hold_in_small_categories():
    rng = np.random.default_rng(6)
    p = np.repeat(
        rng.uniform(0.3, 0.9, 18), 5
    )  # eighteen categories of five images, as MMStar with a limit
    scores = (rng.random((SIMULATIONS, 90)) < p).T.astype(float) / 5 / 18
    images = pd.Series(np.arange(90))
    draws = 100 * resample(scores, images, images // 5, 1000, 0)
    assert 0.93 <= covered(100 * p.mean(), 100 * scores.sum(axis=0), draws) <= 0.97


def test_p_values_are_uniform_without_a_difference():
    rng = np.random.default_rng(7)
    p = image_effects(rng, 80, 4)
    scores = (
        np.stack([rng.random(p.shape) < p, rng.random(p.shape) < p])
        .astype(float)
        .transpose(2, 1, 0)
    )
    images = pd.Series(np.arange(320) // 4)
    sums = resample(
        scores[..., 1] - scores[..., 0], images, pd.Series("", index=images.index), 1000, 0
    )
    rejected = np.mean([Interval.of(0.0, sums[:, i]).p < 0.05 for i in range(SIMULATIONS)])
    assert 0.03 <= rejected <= 0.07


def test_resampling_is_paired_and_repeats():
    base = drawn(8, 400, 0.7)
    cells = {
        "a": samples(base, 4),
        "b": samples(base, 4),
        "c": samples(base & drawn(9, 400, 0.97), 4),
    }
    found = estimate("gqa", "accuracy", cells, 500)
    assert found.difference("a", "b")[0] == 0
    assert np.isnan(
        found.difference("a", "b").low
    )  # the same answers: no interval, and no evidence
    assert found.difference("a", "b").p == 1
    gap, alone = found.difference("c", "a"), found.interval("a")
    assert gap.high - gap.low < 0.5 * (alone.high - alone.low)
    again = estimate("gqa", "accuracy", dict(reversed(cells.items())), 500)
    assert again.difference("c", "a") == gap
    assert estimate("gqa", "accuracy", cells, 500, seed=1).difference("c", "a") != gap


def test_the_relative_average_is_the_mean_of_ratios():
    first = Estimates(
        pd.Series({"none": 80.0, "a": 60.0}),
        pd.DataFrame({"none": [80.0, 90.0], "a": [60.0, 45.0]}),
    )
    second = Estimates(
        pd.Series({"none": 1000.0, "a": 900.0}),
        pd.DataFrame({"none": [1000.0, 1000.0], "a": [900.0, 700.0]}),
    )
    found = stats.relative_average([first, second], "none")
    assert found.values.to_dict() == {"none": 100.0, "a": 82.5}
    assert found.draws["a"].tolist() == [82.5, 60.0]
    with pytest.raises(ValueError, match="scores 0"):
        stats.relative_average([Estimates(first.values * 0, first.draws), second], "none")


# tests


def test_mcnemar_by_hand():
    before = samples(np.array([True] * 20 + [False] * 5))
    after = samples(np.array([False] * 10 + [True] * 12 + [False] * 3))
    found = flips(before, after)
    assert (found.right_to_wrong, found.wrong_to_right) == (10, 2)
    assert found.p == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert found.agreement == pytest.approx(13 / 25)
    assert flips(before, before) == (0, 0, 1.0, 1.0)
    shared = [samples(rows["score"] == 1, per_image=2) for rows in (before, after)]
    assert np.isnan(flips(*shared).p)  # two questions an image are not independent


def test_signs_by_hand():
    found = stats.sign_test([-1.0] * 15)
    assert (found.below, found.above) == (15, 0)
    assert found.p == pytest.approx(2 / 2**15)
    assert stats.sign_test([-1, 2, 0, np.nan, -3])[:3] == (2, 1, 1.0)
    assert stats.sign_test([-1.0] * 5).level == 0  # p is at least 1/16
    assert stats.sign_test([-1.0] * 6).level == pytest.approx(2 / 64)
    assert np.isnan(stats.sign_test([0.0]).p)


def test_the_sign_test_rejects_as_often_as_it_says():
    drawn_signs = np.random.default_rng(18).normal(size=(4000, 15))
    found = [stats.sign_test(row) for row in drawn_signs]
    rejected = np.mean([one.p <= 0.05 for one in found])
    assert rejected == pytest.approx(found[0].level, abs=0.01)
    assert rejected <= 0.07


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.2, np.nan, 0.9])
    assert adjusted[[0, 2]].tolist() == pytest.approx([0.4, 0.9])
    assert np.isnan(adjusted[1])


def test_the_tied_best_are_those_not_shown_to_be_worse():
    base = drawn(10, 2000, 0.8)
    swap = drawn(11, 2000, 0.5)
    cells = {
        "best": samples(base, 4),
        "as good": samples(np.where(swap, base, drawn(12, 2000, 0.8)), 4),
        "worse": samples(base & drawn(13, 2000, 0.9), 4),
    }
    found = estimate("gqa", "accuracy", cells, 2000)
    assert found.tied_best(list(cells)) == {"best", "as good"}
    assert found.tied_best(["worse"]) == {"worse"}


def test_the_difference_to_random_includes_the_seeds():
    base = drawn(14, 1200, 0.7)
    seeds = {
        f"random {i}": samples(
            np.where(drawn(20 + i, 1200, 0.8), base, drawn(30 + i, 1200, 0.6)), 4
        )
        for i in range(3)
    }
    found = estimate("gqa", "accuracy", {"a": samples(base, 4), **seeds}, 2000)
    rows = found.over_seeds({"a": ["a"], "random": list(seeds)})
    over = rows.difference("a", "random")
    assert over.value == pytest.approx(
        found.values["a"] - np.mean([found.values[name] for name in seeds])
    )
    one = found.difference("a", "random 0")
    assert over.low < over.value < over.high
    assert over.high - over.low < one.high - one.low  # a mean of three
    assert rows.draws["a"].equals(found.draws["a"])


def test_seeds_are_resampled_with_the_spread_of_a_mean_and_alike_in_every_task():
    values = {"r 0": 1.0, "r 1": 2.0, "r 2": 4.0}
    # without documents: every resample has the values themselves
    one_task = Estimates(pd.Series(values), pd.DataFrame([values] * 20_000))
    rows = {"r": list(values), "one": ["r 0"]}
    found = one_task.over_seeds(rows)
    assert found.values.to_dict() == {"r": pytest.approx(7 / 3), "one": 1}
    assert found.draws["r"].var() == pytest.approx(np.var([1, 2, 4], ddof=1) / 3, rel=0.05)
    assert found.draws["one"].eq(1).all()
    assert one_task.over_seeds(rows).draws.equals(found.draws)


def test_a_detectable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(15)
    draws = pd.DataFrame({"a": rng.normal(0, 2, 100_000), "b": 0.0})
    smallest = Estimates(pd.Series({"a": 0.0, "b": 0.0}), draws).detectable("a", "b")
    assert smallest == pytest.approx(2.8016 * 2, rel=0.01)
    seen = np.abs(rng.normal(smallest, 2, 100_000)) > 1.96 * 2
    assert seen.mean() == pytest.approx(0.8, abs=0.01)


# bad input


def test_what_cannot_be_compared_is_refused():
    good = samples(drawn(16, 40, 0.7), 2, categories=4)
    broken = good.assign(score=good["score"].where(good.index != 3))
    with pytest.raises(ValueError, match="score that is not a number"):
        estimate("gqa", "accuracy", {"a": broken}, 20)
    with pytest.raises(ValueError, match="document twice"):
        estimate("gqa", "accuracy", {"a": pd.concat([good, good[:1]])}, 20)
    with pytest.raises(ValueError, match="b and a answered other documents"):
        estimate("gqa", "accuracy", {"a": good, "b": good[:-2]}, 20)
    with pytest.raises(ValueError, match="single image"):
        estimate("gqa", "accuracy", {"a": good[:2]}, 20)
    with pytest.raises(ValueError, match="single image in category 'c3'"):
        estimate(
            "mmstar", "accuracy", {"a": good[good["category"].ne("c3") | (good.index == 6)]}, 20
        )
    with pytest.raises(ValueError, match="no column category"):
        estimate("mmstar", "accuracy", {"a": good.drop(columns="category")}, 20)
    with pytest.raises(ValueError, match="not exactly two"):
        estimate("mme", "mme_total", {"a": good[1:]}, 20)


def test_equal_scores_on_all_documents_have_no_interval():
    found = estimate("gqa", "accuracy", {"a": samples(np.ones(40, dtype=bool), 2)}, 20).interval(
        "a"
    )
    assert found.value == 100
    assert np.isnan([found.low, found.high]).all()
