"""Averages by the formula of each paper: printed ones, and ours over resampled columns."""

import numpy as np
import pandas as pd
import pytest

from secateur.reporting import averages, reported, stats

FOUND = averages.check(reported.load_reported()).set_index(["paper", "table"]).sort_index()


def test_printed_averages_follow_from_the_printed_scores_by_the_formula_of_their_table():
    for paper, table in (("SCOPE", "Table 1"), ("PruneSID", "Table 2"), ("PruneSID", "Table 12")):
        assert FOUND.loc[(paper, table), "follows"].all()
    for table in ("Table 2", "Table 3"):
        rows = FOUND.loc[("PromPrune", table)]
        assert (rows["printed"] - rows["recomputed"]).abs().max() <= 0.061
        assert (rows["printed"] - rows["mean_of_ratios"]).abs().max() > 0.9


def test_averages_of_promprune_table_1_that_its_scores_do_not_give():
    rows = FOUND.loc[("PromPrune", "Table 1")].set_index(["method", "budget"])
    assert rows["follows"].sum() == 10
    assert rows.loc[["fastv", "sparsevlm", "visionzip"], "follows"].all()
    own = rows.loc["promprune"]
    assert (own["recomputed"] - own["printed"]).between(1.9, 2.1).all()


def test_a_table_without_a_row_for_the_unpruned_model_borrows_it():
    numbers = reported.load_reported().query("paper == 'PromPrune' and model == 'llava_1_5_7b'")
    for table in ("Table 4", "Table 5"):
        own = numbers[numbers["table"] == table]
        tasks = set(own["task"])
        base = numbers[(numbers["table"] == "Table 1") & (numbers["method"] == "none")]
        base = base[base["task"].isin(tasks) & (base["task"] != "average")].assign(table=table)
        assert averages.check(own).empty
        found = averages.check(pd.concat([own, base]))
        assert len(found) == (own["task"] == "average").sum()
        assert found["follows"].all()


def test_formulas_by_hand():
    metrics = ["accuracy", "mme_perception"]
    scores, unpruned = np.array([40.0, 1000.0]), np.array([50.0, 2000.0])
    by_hand = {
        averages.MEAN_OF_RATIOS: 65.0,
        averages.RATIO_OF_MEANS: 100 * (40 + 0.5) / (50 + 1),
        averages.MEAN_OF_SCORES: (40 + 0.5) / 2,
    }
    for formula, value in by_hand.items():
        assert averages.mean(formula, metrics, scores, unpruned) == pytest.approx(value)


def estimates(values, draws):
    keys = ["none", "scope"]
    return stats.Estimates(pd.Series(values, keys), pd.DataFrame(draws, columns=keys), 9.0)


def test_columns_are_resampled_together():
    columns = [
        estimates([50.0, 40.0], [[50.0, 40.0], [40.0, 36.0]]),
        estimates([80.0, 60.0], [[90.0, 60.0], [60.0, 54.0]]),
    ]
    own = averages.estimate(
        averages.MEAN_OF_RATIOS, ["accuracy"] * 2, columns, ["none", "scope"], "none"
    )
    expected = stats.relative_average(columns, "none")
    pd.testing.assert_series_equal(own.values, expected.values)
    pd.testing.assert_frame_equal(own.draws, expected.draws)
    other = averages.estimate(averages.RATIO_OF_MEANS, ["accuracy"] * 2, columns, ["scope"], "none")
    assert other.values["scope"] == pytest.approx(100 * 100 / 130)
    assert other.draws["scope"].tolist() == pytest.approx([100 * 100 / 140, 90.0])


def test_an_unpruned_score_of_zero_is_refused():
    column = estimates([0.0, 40.0], [[0.0, 40.0], [0.0, 36.0]])
    with pytest.raises(ValueError, match=r"scores 0 in a column \(pope_f1\)"):
        averages.estimate(averages.MEAN_OF_RATIOS, ["pope_f1"], [column], ["scope"], "none")
