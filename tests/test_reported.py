"""Published numbers are complete, typed and checked; repetitions and contradictions are found."""

import re

import pandas as pd
import pytest

from secateur.reporting import reported

ROW = {
    "paper": "P",
    "table": "Table 1",
    "model": "m",
    "method": "scope",
    "budget_tokens": "64",
    "retention_pct": "11.1",
    "budget_scope": "image",
    "task": "pope",
    "metric": "pope_f1",
    "value": "83.9",
    "unit": "%",
    "suspect": "False",
    "note": "",
    "source": "full text, Table 1",
}


@pytest.fixture(scope="module")
def numbers() -> pd.DataFrame:
    return reported.load_reported()


def saved(tmp_path, *changes):
    path = tmp_path / "accuracy.csv"
    pd.DataFrame([ROW | change for change in changes]).to_csv(path, index=False)
    return path


def test_every_number_loads_typed_and_with_its_source(numbers):
    assert {name: str(numbers.dtypes[name]) for name in reported.ACCURACY} == reported.ACCURACY
    assert len(numbers) == 4250
    costs = reported.load_efficiency()
    assert set(costs["quantity"]) == set(reported.QUANTITIES)
    for source in {*numbers["source"], *costs["source"]}:
        # an arXiv id, or a repository and its commit
        assert re.search(r"arXiv \d{4}\.\d{5}|arxiv\.org/abs/\d{4}\.\d{5}|at [0-9a-f]{7}\b", source)
        assert not re.search(r"file id|^/|^~", source)


def test_suspect_rows_are_kept_and_say_why(numbers):
    suspect = numbers[numbers["suspect"]]
    assert len(suspect) == 72
    row = suspect[(suspect["paper"] == "PruneSID") & (suspect["table"] == "Table 9")]
    assert set(row["method"]) == {"prunesid"}
    assert row["note"].str.contains("equals that of VisionZip").all()


def test_a_good_row_loads(tmp_path):
    row = reported.load_reported(saved(tmp_path, {})).iloc[0]
    assert (row["budget"], row["value"], row["note"]) == ("64", 83.9, "")
    budgets = [{"budget_tokens": ""}, {"retention_pct": "100", "method": "none"}]
    assert reported.load_reported(saved(tmp_path, *budgets))["budget"].tolist() == ["11.1%", "full"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": ""}, "source .* is missing"),
        ({"value": ""}, "value .* is missing"),
        ({"metric": "pope"}, "metric 'pope' is not known; known: accuracy, pope_f1"),
        ({"task": "popes"}, "task 'popes' is not known"),
        ({"metric": "accuracy"}, "task 'pope' has no metric accuracy"),
        ({"task": "gqa"}, "task 'gqa' has no metric pope_f1"),
        ({"value": "839"}, "value .*839.* cannot be: pope_f1 lies in 0..100"),
        (
            {"task": "mme", "metric": "mme_perception", "value": "2100", "unit": "points"},
            "lies in 0..2000",
        ),
        ({"unit": "points"}, "unit 'points' is wrong"),
        ({"suspect": "True"}, "note .* is missing: why"),
        ({"budget_scope": "tile"}, "budget_scope 'tile' is not one of image, layer"),
        ({"retention_pct": "111"}, "is not a percentage"),
        ({"value": "many"}, "many"),
    ],
)
def test_a_bad_row_is_refused_by_line(tmp_path, change, message):
    path = saved(tmp_path, {"method": "other"}, change)
    with pytest.raises(ValueError, match=message) as error:
        reported.load_reported(path)
    assert "many" in change.values() or "line 3" in str(error.value)


def test_a_number_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="given twice"):
        reported.load_reported(saved(tmp_path, {}, {"value": "84.0"}))


def test_a_missing_column_is_refused(tmp_path):
    path = tmp_path / "accuracy.csv"
    pd.DataFrame([ROW]).drop(columns="source").to_csv(path, index=False)
    with pytest.raises(ValueError, match="source"):
        reported.load_reported(path)


def test_copied_baselines_are_found(numbers):
    found = reported.duplicates(numbers).set_index(["model", "method", "budget", "task", "metric"])
    row = found.loc[("llava_1_5_7b", "visionzip", "192", "gqa", "accuracy")]
    assert (row["value"], row["papers"], row["where"]) == (
        59.3,
        3,
        "HiPrune Table 2, PruneSID Table 1, SCOPE Table 1",
    )
    assert row["kind"] == "copied baseline"
    assert found["kind"].map(reported.ALIKE.index).is_monotonic_increasing


def test_contradictions_are_found_by_kind_and_widest_first(numbers):
    found = reported.contradictions(numbers)
    assert found["kind"].map(reported.DIFFERENT.index).is_monotonic_increasing
    for _, own in found.groupby("kind"):
        assert own["spread_percent"].is_monotonic_decreasing
    row = found.set_index(["model", "method", "budget", "task"]).loc[
        ("llava_1_5_7b", "visionzip", "192", "mme")
    ]
    assert re.fullmatch(
        r"1749: RESTORE Table 1 \| 1783: .*SCOPE Table 1 \| 1834: DiffPrune Table 1",
        row["values"],
    )
    inside = found.set_index(["model", "method", "budget", "task"]).loc[
        ("llava_1_5_7b", "prunesid", "192", "mme")
    ]
    assert "1793: PruneSID Table 5" in inside["values"]  # one paper, two tables
    assert inside["kind"] == "copied with a change"
    assert not (found["metric"] == "relative_average").any()


def test_rows_of_an_unknown_number_of_tokens_are_no_cell(tmp_path):
    unknown, other = {"budget_tokens": "", "retention_pct": ""}, {"paper": "Q", "value": "80.0"}
    rows = reported.load_reported(saved(tmp_path, {}, unknown, unknown | other))
    assert rows["budget"].tolist() == ["64", "unknown", "unknown"]
    assert reported.contradictions(rows).empty
    rows = reported.load_reported(saved(tmp_path, {}, other))
    assert len(reported.contradictions(rows)) == 1
