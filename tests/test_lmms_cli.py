"""lmms-eval's own command line with `--model secateur`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.lmms_model import Secateur
from secateur.pruners import REGISTRY, build
from secateur.shapes.datasets import SIZES
from secateur.shapes.datasets import build as build_shapes

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "eval" / "shapes" / "model"


def test_the_entry_point_runs_a_pruned_task(tmp_path):
    root = build_shapes(tmp_path / "shapes", dict.fromkeys(SIZES, 6))
    arguments = (
        f"pretrained={WEIGHTS},dtype=float32,device=cpu,"
        "pruner=scope,budget=16,pruner.alpha=1.5,batch_tokens=500"
    )
    command = [
        "-m",
        "lmms_eval",
        "--model",
        "secateur",
        "--model_args",
        arguments,
        "--tasks",
        "pope",
        "--limit",
        "6",
    ]
    ended = subprocess.run(
        [sys.executable, *command, "--output_path", str(tmp_path / "out"), "--log_samples"],
        cwd=root,  # `load_dataset` prefers a folder of the data set's name here
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    record = json.loads(results.read_text())
    assert 0 <= record["results"]["pope"]["pope_accuracy,none"] <= 1
    (samples,) = (tmp_path / "out").rglob("*_samples_pope.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    assert len(answers) == 6
    assert any(answer[0] for answer in answers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "pruner=scope,budget=16,alpha=2",
            "'alpha'; a pruner's own fields are written pruner.name=value",
        ),
        ("pruner=scope,pruner.beta=2,budget=16", "has no option beta"),
        ("pruner=scopes,budget=16", "unknown pruner 'scopes'"),
        ("pruner=scope,budget=0", "at least 1 visual token"),
        ("pruner=mine,plugins=/nowhere/mine.py", "plugins: there is no file /nowhere/mine.py"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Secateur.create_from_arg_string(
            f"pretrained={WEIGHTS},dtype=float32,{arguments}", {"batch_size": 1, "device": "cpu"}
        )


def test_methods_from_files_are_known(tmp_path):
    for name in ("their_norms", "their_sums"):
        (tmp_path / f"{name}.py").write_text(
            "from dataclasses import dataclass\n"
            "from secateur.pruners import ScoreTopK, register\n"
            f"@register({name!r})\n"
            "@dataclass(frozen=True)\n"
            "class Theirs(ScoreTopK):\n"
            "    paper, status = '-', 'official'\n"
            "    def score(self, tokens):\n"
            "        return tokens.features.sum(-1)\n"
        )
    files = os.pathsep.join(str(path) for path in sorted(tmp_path.glob("*.py")))
    try:
        model = Secateur.create_from_arg_string(
            f"pretrained={WEIGHTS},dtype=float32,pruner=their_sums,budget=16,plugins={files}",
            {"batch_size": 1, "device": "cpu"},
        )
        assert model.method == build("their_sums")
        assert {"their_norms", "their_sums"} <= set(REGISTRY)
    finally:
        REGISTRY.pop("their_norms", None)
        REGISTRY.pop("their_sums", None)


def test_batch_sizes_are_refused():
    with pytest.raises(ValueError, match="batch_tokens"):
        Secateur.create_from_arg_string(f"pretrained={WEIGHTS}", {"batch_size": 8, "device": "cpu"})
