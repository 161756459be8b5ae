"""The literal formulations agree with the pruners, and the benchmark of both runs."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from reference.literal import METHODS
from synthetic import visual_tokens

from secateur.pruners import build

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("kind", ["gauss", "clusters"])
def test_literal_formulation_picks_the_same(name: str, kind: str) -> None:
    for seed, keep in enumerate((8, 21, 40)):
        tokens = visual_tokens(1, (8, 8), seed=seed, width=96, heads=4, kind=kind)
        assert METHODS[name](tokens, keep) == build(name).prune(tokens, keep).indices[0].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"grouping": "kmeans"},
        {"grouping": "random"},
        {"grouping": "random", "score": "norm"},
        {"nms": False},
        {"least_first": True},
        {"alpha": 24.0},
        {"alpha": 40.0},
        {"groups": 3},
        {"groups": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["gauss", "clusters"])
def test_literal_ablations_of_prunesid_pick_the_same(options: dict, kind: str) -> None:
    for seed, keep in enumerate((21, 24, 40)):
        tokens = visual_tokens(1, (8, 8), seed=seed, width=96, heads=4, kind=kind)
        literal = METHODS["prunesid"](tokens, keep, **options)
        assert literal == build("prunesid", **options).prune(tokens, keep).indices[0].tolist()


def test_benchmark_writes_its_tables(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "scripts/bench_select.py",
        "--quick",
        "--pruners",
        "fastervlm,fastv",
        "--out",
        str(tmp_path),
    ]
    subprocess.run([*command, "--threads", "1"], cwd=ROOT, check=True, capture_output=True)
    with (tmp_path / "select-cpu-quick.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["pruner"], row["batch"], row["identical"]) for row in rows] == [
        ("cosine Gram", "1", ""),
        ("cosine Gram", "8", ""),
        ("fastervlm", "1", "True"),
        ("fastervlm", "8", ""),
        ("fastv", "1", ""),
        ("fastv", "8", ""),
    ]
    assert all(float(row["q1"]) <= float(row["median"]) <= float(row["q3"]) for row in rows)
    assert "| fastervlm | 64 |" in (tmp_path / "select-cpu-quick.md").read_text()
