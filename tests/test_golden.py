"""Exactness against recorded outputs of the official code, on some of the recorded cases."""

import json
from pathlib import Path

import pytest
import torch
from reference.golden import GoldenError, Report, check, files
from reference.golden_adapters import METHODS, Comparison
from safetensors.torch import load_file, save_file

from scripts.check_golden import main

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("path", files(GOLDEN), ids=lambda path: path.stem)
def test_cases_are_exact(path: Path) -> None:
    report = check(path)
    assert not report.mismatches
    assert not report.ties
    assert report.exact == report.cases == len(json.loads(path.read_text())["cases"])


def test_every_adapter_has_a_case() -> None:
    assert {path.stem.removesuffix("_ref") for path in files(GOLDEN)} == set(METHODS)


def test_the_subset_stays_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) <= 2_000_000


@pytest.mark.parametrize(
    ("ours", "theirs", "exact"),
    [
        ([1, 2], [1, 2], True),
        ([2, 1], [1, 2], False),
        ([1, 2], [1, 2, 3], False),
        ([], [], True),
        ([1.0], [1.000009], True),
        ([1.0], [1.00002], False),
        ([float("nan")], [1.0], False),
    ],
)
def test_comparison(ours: list, theirs: list, exact: bool) -> None:
    assert Comparison("x", torch.tensor(ours), torch.tensor(theirs)).exact is exact


def test_a_wrong_answer_is_a_mismatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tensors = load_file(GOLDEN / "hiprune.safetensors")
    name = next(key for key in tensors if key.endswith(".sorted"))
    save_file(
        tensors | {name: tensors[name].flip(0).contiguous()}, tmp_path / "hiprune.safetensors"
    )
    (tmp_path / "hiprune.json").write_text((GOLDEN / "hiprune.json").read_text())
    monkeypatch.setattr("sys.argv", ["check_golden.py", str(tmp_path)])
    assert main() == 1
    assert f"mismatch: hiprune {name.split('.')[0]}: sorted" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_candidates_that_rounding_decides_between_are_a_tie(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    index = json.loads((GOLDEN / f"{method}.json").read_text())
    case = index["cases"][0]
    name = case.get("id") or case["case"]
    tensors = {
        key.removeprefix(f"{name}."): t.clone()
        for key, t in load_file(GOLDEN / f"{method}.safetensors").items()
        if key.startswith(f"{name}.")
    }
    order, kept = {"divprune": ("order", "sorted"), "fastv": ("top", "keep")}[method]
    first, pick = case.get("image_start", 0), int(tensors[order][-1])
    twin, other = [
        at for at in range(first, first + case["N"]) if at not in tensors[order].tolist()
    ][-2:]
    if method == "divprune":
        tensors["features"][twin] = tensors["features"][pick] * (1 + 1e-7)
    else:
        attention = tensors["last_query_attention"]
        attention[:, twin] = attention[:, pick] - 3e-8

    def recorded(last: int) -> Report:
        """The check of the case whose record has `last` as its last pick."""
        own = {key: t.clone() for key, t in tensors.items()}
        own[order][-1] = last
        own[kept] = own[kept].masked_fill(own[kept] == pick, last).sort().values
        path = tmp_path / f"{method}.json"
        path.write_text(json.dumps(index | {"cases": [case], "file": f"{method}.safetensors"}))
        save_file({f"{name}.{key}": t for key, t in own.items()}, path.with_suffix(".safetensors"))
        return check(path)

    # which of the two is exact depends on the build of torch
    exact, tied = sorted(map(recorded, (pick, twin)), key=lambda one: one.exact, reverse=True)
    assert (exact.exact, exact.ties, exact.mismatches) == (1, [], [])
    assert (tied.exact, len(tied.ties), tied.mismatches) == (0, 1, [])
    assert "apart in float64" in tied.ties[0]

    wrong = recorded(other)  # no rounding picks this one
    assert (wrong.exact, wrong.ties, len(wrong.mismatches)) == (0, [], 1)

    recorded(twin if recorded(pick).exact else pick)
    monkeypatch.setattr("sys.argv", ["check_golden.py", str(tmp_path)])
    assert main() == 0
    assert "0 of 1 cases exact, 1 ties" in capsys.readouterr().out


@pytest.mark.parametrize("above", [0, 7])
@pytest.mark.parametrize(
    "file", ["cdpruner", "divprune", "fsr_ref", "scope", "sppruner_ref", "zspaprune_ref"]
)
def test_a_budget_of_all_tokens_leaves_them_alone(file: str, above: int, tmp_path: Path) -> None:
    index, tensors = (
        json.loads((GOLDEN / f"{file}.json").read_text()),
        load_file(GOLDEN / f"{file}.safetensors"),
    )
    case = index["cases"][0]
    name, budget = (
        case.get("id") or case["case"],
        "budget_per_crop" if file == "cdpruner" else "budget",
    )
    case[budget] = case["N"] + above
    for key, value in tensors.items():
        if key.startswith(name) and key.endswith("sorted"):
            tensors[key] = (
                torch.arange(case["N"]).repeat(*value.shape[:-1], 1).view(*value.shape[:-1], -1)
            )
    if f"{name}.tokens" in tensors:
        tensors[f"{name}.tokens"] = tensors[f"{name}.visual"].clone()
    path = tmp_path / f"{file}.json"
    path.write_text(json.dumps(index | {"cases": [case], "file": f"{file}.safetensors"}))
    save_file(tensors, tmp_path / f"{file}.safetensors")
    assert check(path).exact == 1
    case[budget] = case["N"] - 1
    path.write_text(json.dumps(index | {"cases": [case], "file": f"{file}.safetensors"}))
    assert check(path).exact == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a golden index"),
        ("{", "not a golden index"),
        ("[]", "not a golden index"),
        ('{"method": "scope", "cases": []}', "no cases"),
        ('{"method": "scope", "cases": [{}]}', "cases without id"),
        ('{"method": "unheard", "cases": [{"id": "a"}]}', "unknown method 'unheard'; known: "),
        ('{"method": "scope", "cases": [{"case": "a"}, {"case": "a"}]}', "more than once"),
        ('{"method": "scope", "cases": [{"case": "a"}]}', "scope.safetensors: cannot be read"),
    ],
)
def test_bad_files_are_one_clear_error(
    content: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    path = tmp_path / "scope.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr("sys.argv", ["check_golden.py", str(path)])
    assert main() == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_case_without_its_tensors_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "scope.json").write_text((GOLDEN / "scope.json").read_text())
    save_file({"c00.features": torch.zeros(1, 4, 2)}, tmp_path / "scope.safetensors")
    with pytest.raises(GoldenError, match="case c00 lacks 'cls_attn'"):
        check(tmp_path / "scope.json")


def test_a_folder_without_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="no JSON file in this folder"):
        files(tmp_path)
