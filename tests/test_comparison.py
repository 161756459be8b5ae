"""The sweep's own comparison: known effects are found, and what limits a row is said."""

import numpy as np
import pandas as pd
import pytest
from cells import cell, changed, rows, save

from secateur.reporting.comparison import compare, load, settings
from secateur.reporting.interval_table import markdown, write
from secateur.reporting.stats import Estimates
from secateur.reporting.tables import NOTE

MODEL = "llava_1_5_7b"


def grid(tasks=("pope", "gqa"), **methods):
    """Cells of methods at 64 tokens, beside an unpruned cell with 80 % right answers.

    A method has its share of right answers, or (share, shift, tokens).
    """
    found = [cell(MODEL, "none", "full", task, rows(task, 0.8), 576) for task in tasks]
    for method, effect in methods.items():
        share, shift, tokens = effect if isinstance(effect, tuple) else (effect, 0, 64)
        found += [
            cell(MODEL, method, "64", task, rows(task, share, shift=shift), tokens)
            for task in tasks
        ]
    return found


@pytest.fixture(scope="module")
def compared():
    cells = grid(scope=0.78, visionzip=(0.78, 1, 64), divprune=0.6, random=0.7)
    cells += [
        cell(MODEL, "random", "64", task, rows(task, 0.7, shift=shift), 64, seed=shift)
        for shift in (1, 2)
        for task in ("pope", "gqa")
    ]
    return cells, compare(cells, 1000)


def test_known_effects_are_found(compared):
    _, table = compared
    gqa = table[table["task"] == "gqa"].set_index("method")
    assert gqa["value"].round(6).to_dict() == {
        "none": 80,
        "scope": 78,
        "visionzip": 78,
        "divprune": 60,
        "random": 70,
    }
    assert gqa.loc["random", "seeds"] == 3
    assert gqa.loc["random", "sd"] == pytest.approx(0)
    assert gqa.loc["scope", "seeds"] == 1
    assert gqa.loc["scope", "difference"] == pytest.approx(-2)
    assert gqa.loc["scope", ["right_to_wrong", "wrong_to_right"]].tolist() == [40, 0]
    assert gqa.loc["scope", "agreement"] == pytest.approx(0.98)
    assert gqa["mcnemar"].isna().all()  # ten questions an image: no test of documents
    # as large, but of other documents: one is sure, the other is not
    assert gqa.loc["scope", "p_holm"] < 0.05 < gqa.loc["visionzip", "p_holm"]
    assert set(gqa.index[gqa["tied_best"]]) == {"scope", "visionzip"}
    assert gqa.loc["scope", "over_random"] == pytest.approx(8)
    assert gqa.loc["scope", "over_random_low"] > 0 > gqa.loc["divprune", "over_random_high"]
    assert np.isnan(gqa.loc["random", "over_random"])


def test_the_average_is_over_all_tasks(compared):
    _, table = compared
    average = table[table["task"] == "average"].set_index("method")
    assert average.loc["none", "value"] == 100
    assert average.loc["divprune", "value"] == pytest.approx(75)
    assert set(average.index[average["tied_best"]]) == {"scope", "visionzip"}


def test_the_table_says_what_it_shows(compared, tmp_path):
    cells, table = compared
    text = markdown(cells, table)
    assert "| divprune        | 64       | 64.0     | 60.0 ± " in text
    assert "| random, 3 seeds | 64       | 64.0     | " in text
    assert "power 80 %" in text
    assert f"{len(cells)} cells, commit abc." in text
    assert "three seeds" not in text
    paths = write(cells, table, tmp_path / "intervals_hub_llava_1_5_7b_all")
    assert [path.name for path in paths] == [
        "intervals_hub_llava_1_5_7b_all.md",
        "intervals_hub_llava_1_5_7b_all.csv",
    ]
    assert len(pd.read_csv(paths[1])) == len(table)


def test_methods_that_keep_more_tokens_are_not_compared():
    cells = grid(tasks=["gqa"], scope=0.7, visionzip=0.7, fastervlm=0.6, sparsevlm=(0.75, 0, 82))
    table = compare(cells, 500).set_index("method")
    assert table.loc["sparsevlm", "mark"] == "82.0 tokens where the others of its budget keep 64.0"
    assert set(table.index[table["tied_best"]]) == {"scope", "visionzip"}


@pytest.mark.parametrize(("few", "many"), [(60, 64), (0, 64)])
def test_two_methods_of_other_token_numbers_are_marked_and_the_task_estimated(few, many):
    table = compare(
        grid(tasks=["gqa"], scope=(0.7, 0, few), visionzip=(0.6, 0, many)), 200
    ).set_index("method")
    assert table["low"].notna().all()
    assert table["mark"].to_dict() == {
        "none": "",
        "scope": "",
        "visionzip": f"{many:.1f} tokens where the others of its budget keep {few:.1f}",
    }
    assert set(table.index[table["tied_best"]]) == {"scope"}


def test_an_unexpected_error_is_not_taken_for_a_missing_interval(monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(Estimates, "tied_best", broken)
    with pytest.raises(ValueError, match="a bug"):
        compare(grid(tasks=["gqa"], scope=0.7), 200)


def test_an_unpruned_score_of_0_gives_no_average_and_everything_else_is_there():
    cells = [*grid(scope=0.7)[1:], cell(MODEL, "none", "full", "pope", rows("pope", 0.0), 576)]
    table = compare(cells, 200)
    assert set(table["task"]) == {"pope", "gqa"}
    pope = table[table["task"] == "pope"]
    assert pope["mark"].str.contains("no baseline: the unpruned model scores 0").all()
    assert not table.loc[table["task"] == "gqa", "mark"].str.contains("no baseline").any()
    assert "inf" not in markdown(cells, table)


def test_a_task_in_which_the_unpruned_model_scores_0_is_left_out_of_the_average():
    cells = [
        *grid(tasks=("pope", "gqa"), scope=0.7),
        cell(MODEL, "none", "full", "mmstar", rows("mmstar", 0.0), 576),
        cell(MODEL, "scope", "64", "mmstar", rows("mmstar", 0.3), 64),
    ]
    table = compare(cells, 200).set_index(["task", "method"])
    assert "no baseline" in table.loc[("mmstar", "scope"), "mark"]
    assert table.loc[("average", "none"), "value"] == pytest.approx(100)
    two = compare(cells[:4], 200).set_index(["task", "method"])
    assert table.loc[("average", "scope"), "value"] == two.loc[("average", "scope"), "value"]


def test_mcnemar_is_given_where_every_image_has_one_question():
    table = compare(grid(tasks=["scienceqa_img"], scope=0.78), 200).set_index("method")
    assert table.loc["scope", "mcnemar"] == pytest.approx(2 / 2**40)
    assert table.loc["scope", "mcnemar_holm"] >= table.loc["scope", "mcnemar"]


def test_what_resampling_cannot_estimate_is_marked():
    same = grid(tasks=["gqa"], scope=0.8)
    flipped = [cell(MODEL, "none", "full", "gqa", rows("gqa", 0.0), 576)]
    flipped.append(cell(MODEL, "scope", "64", "gqa", rows("gqa", 1.0), 64))
    for cells, p in ((same, 1.0), (flipped, np.nan)):
        table = compare(cells, 200).set_index("method")
        assert table.loc["scope", "p"] == pytest.approx(p, nan_ok=True)
        assert np.isnan(table.loc["scope", "detectable"])
        assert "no interval of the difference" in table.loc["scope", "mark"]
        assert "gqa cannot be estimated" in markdown(cells, table.reset_index())


def test_a_record_is_checked_where_no_interval_can_be_given():
    one = rows("gqa", 0.7, 10)
    cells = [
        cell(MODEL, "none", "full", "gqa", one, 576),
        cell(MODEL, "scope", "64", "gqa", one, 64),
    ]
    assert compare(cells, 200)["mark"].str.contains("a single image: no interval").all()
    cells[1:] = changed(cells[1:], {"metrics.exact_match": 0.75})
    marks = compare(cells, 200)["mark"]
    assert marks.str.contains(
        "the record of scope at 64 has accuracy 75.00, its samples give"
    ).all()


def test_a_model_that_says_one_thing_is_marked():
    cells = grid(tasks=["gqa"], scope=0.7)
    constant = cells[1].rows.assign(
        answer="yes", score=(cells[1].rows["target"] == "yes").astype(float)
    )
    table = compare([cells[0], cell(MODEL, "scope", "64", "gqa", constant, 64)], 200).set_index(
        "method"
    )
    assert table.loc["scope", "mark"] == "every answer is 'yes'"


def test_few_images_are_marked():
    for images, few in ((49, True), (50, False)):
        cells = [
            cell(MODEL, "none", "full", "gqa", rows("gqa", 0.9, 10 * images), 576),
            cell(MODEL, "scope", "64", "gqa", rows("gqa", 0.3, 10 * images), 64),
        ]
        table = compare(cells, 500)
        text = markdown(cells, table)
        mark = f"{images} images: intervals are too short"
        assert table["mark"].tolist() == [mark if few else ""] * 2
        assert table["tied_best"].any() == ("**30.0" in text) == (not few)
        assert ("▾ |" in text or "▾**" in text) == (not few)


def test_a_task_that_cannot_be_estimated_is_marked_and_not_averaged():
    cells = grid(scope=0.7)
    broken = cells[-1].rows.assign(
        score=cells[-1].rows["score"].where(cells[-1].rows["doc_id"] != 5)
    )
    table = compare([*cells[:-1], cells[-1]._replace(rows=broken)], 200)
    gqa = table[table["task"] == "gqa"]
    assert gqa["mark"].str.contains("gqa: scope at 64 has a score that is not a number").all()
    assert gqa["low"].isna().all()
    assert not (table["task"] == "average").any()
    assert "No average" in markdown(cells, table)


def test_a_record_that_its_samples_contradict_is_marked():
    cells = grid(tasks=["gqa"], scope=0.7)
    cells[1:] = changed(cells[1:], {"metrics.exact_match": 0.75})
    assert (
        compare(cells, 200)["mark"].str.contains("has accuracy 75.00, its samples give 70.00").all()
    )


def test_without_an_unpruned_cell_there_are_scores_and_no_comparison():
    cells = grid(tasks=["gqa"], scope=0.7)[1:]
    table = compare(cells, 200)
    assert table["value"].tolist() == pytest.approx([70])
    assert table["difference"].isna().all()
    assert "gqa, all rows: task gqa has no unpruned cell" in markdown(cells, table)


def test_a_task_without_an_unpruned_cell_is_marked_and_the_others_are_compared():
    cells = [cell for cell in grid(scope=0.7) if (cell.task, cell.name) != ("gqa", "none")]
    table = compare(cells, 200).set_index(["task", "method"])
    assert "task gqa has no unpruned cell" in table.loc[("gqa", "scope"), "mark"]
    assert table.loc[("gqa", "scope"), "value"] == pytest.approx(70)
    assert np.isnan(table.loc[("gqa", "scope"), "difference"])
    assert table.loc[("pope", "scope"), "difference"] < 0
    assert "average" not in table.index.get_level_values("task")
    assert "gqa, all rows: task gqa has no unpruned cell" in markdown(cells, table.reset_index())


def test_two_cells_for_one_row_are_refused():
    cells = grid(tasks=["gqa"], scope=0.7)
    with pytest.raises(ValueError, match="two cells of gqa for scope at 64"):
        compare([*cells, cells[1]])


@pytest.mark.parametrize(
    ("field", "value"), [("limit", 60), ("model.dtype", "bfloat16"), ("seed", 1)]
)
def test_cells_of_other_settings_do_not_share_a_table(field, value):
    cells = grid(tasks=["gqa"], scope=0.7)
    cells[1:] = changed(cells[1:], {f"identity.{field}": value})
    with pytest.raises(
        ValueError, match=f"2 settings cannot share a table; {field.split('.')[0]} is"
    ):
        compare(cells)


def test_stored_cells_come_back_by_setting(tmp_path):
    cells = [
        *grid(tasks=["gqa"], scope=0.7),
        cell(MODEL, "none", "full", "gqa", rows("gqa", 0.8, 60), 576, limit=60),
    ]
    for one in cells:
        save(tmp_path, one)
    groups = settings(load(tmp_path))
    assert sorted(len(group) for group in groups) == [1, 2]
    complete = max(groups, key=len)
    pd.testing.assert_frame_equal(
        compare(complete, 200).sort_values("method", ignore_index=True),
        compare(cells[:2], 200).sort_values("method", ignore_index=True),
    )


def test_answers_that_mean_nothing_mark_their_rows():
    cells = grid(tasks=["gqa"], scope=0.7, visionzip=0.6)
    cells[1:2] = changed(cells[1:2], {"unusable_answers": 7, "cut_off_answers": 3})
    table = compare(cells, 200)
    text = markdown(cells, table)
    assert "70.0† ± " in text
    assert "60.0 ± " in text
    assert "gqa, scope 64: 7 of 2000 answers are unusable." in text
    assert "gqa, scope 64: 3 of 2000 answers were cut off" in text
    assert NOTE in text
