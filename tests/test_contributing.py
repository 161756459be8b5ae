"""Performs CONTRIBUTING's recipe in a copy of the project: one file, one YAML, one line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import torch
from hydra import compose, initialize_config_dir
from secateur.job import Job
from secateur.pruners import VisualTokens, build

with initialize_config_dir("{copy}/configs", version_base="1.3"):
    overrides = ["pruner=mine", "pruner.smallest=true", "results={copy}/results"]
    job = Job.of(compose("sweep", overrides=overrides))
tokens = VisualTokens(torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]]))
selections = [pruner.prune(tokens, 2).indices.tolist() for pruner in (job.pruner, build("mine"))]
print(job.pruner, *selections)

import pytest  # in the same process: the libraries are imported once
tests = ["tests/test_pruner_configs.py", "tests/test_properties.py"]
raise SystemExit(pytest.main([*tests, "-k", "mine", "-q", "-p", "no:cacheprovider"]))
"""


def test_the_recipe_adds_a_pruner(tmp_path):
    for folder in ("pruners", "eval", "configs", "tests"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "golden")
        )
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code, config = (
        re.search(rf"   ```{kind}\n(.*?)   ```", text, re.DOTALL)[1].replace("\n   ", "\n")
        for kind in ("python", "yaml")
    )
    # an installed `secateur` is the original; links make the copy one of its own
    links = tmp_path / "links" / "secateur"
    links.mkdir(parents=True)
    for part in [*(tmp_path / "eval").iterdir(), tmp_path / "pruners"]:
        (links / part.name).symlink_to(part)
    environment = os.environ | {"PYTHONPATH": str(links.parent)}

    line = re.search(r"Add the line `(\w+,)`", text)[1]

    (tmp_path / "pruners" / "mine.py").write_text(code.removeprefix("   "))
    (tmp_path / "configs" / "pruner" / "mine.yaml").write_text(config.removeprefix("   "))
    registry = tmp_path / "pruners" / "__init__.py"
    registry.write_text(
        registry.read_text().replace(
            "from secateur.pruners import (\n", f"from secateur.pruners import (\n    {line}\n"
        )
    )

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    printed = run("-c", CHECK.format(copy=tmp_path))
    assert printed.split("\n")[0] == "Mine(smallest=True) [[1, 2]] [[0, 2]]"
    assert "passed" in printed
