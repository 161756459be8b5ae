"""The wheel: it is complete, and `inject` needs none of the extras."""

import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from secateur.paths import ROOT

EXAMPLE = """
import sys, torch
from transformers import AutoModelForImageTextToText
from secateur import build, inject
from secateur.paths import SHAPES_MODEL

model = AutoModelForImageTextToText.from_pretrained(SHAPES_MODEL)
side = model.config.vision_config.image_size
image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
ids = torch.tensor([[1, *[model.config.image_token_id] * 144, 5, 6, 7]])
inputs = {"input_ids": ids, "pixel_values": image, "max_new_tokens": 3, "do_sample": False}
with inject(model, build("scope"), budget=16) as trace:
    model.generate(**inputs)
(record,) = trace.audits
print(record.visual_tokens, record.kept_tokens, "lmms_eval" in sys.modules)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the project, built without a network."""
    copy, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("wheel")
    for part in ("eval", "pruners", "configs", "scripts", "results/reported"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def required(wheel: Path) -> set[str]:
    """Installed distributions that the wheel requires without an extra, directly or not."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    waiting = [
        line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")
    ]
    found: set[str] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.marker is not None and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in (requirement.extras or {""})
        ):
            continue
        if requirement.name in found:
            continue
        try:
            waiting += distribution(requirement.name).requires or []
        except PackageNotFoundError:  # not for this platform
            continue
        found.add(requirement.name)
    return found


def test_the_wheel_holds_configs_reported_numbers_and_templates(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    for folder, inside in (("configs", "configs"), ("results/reported", "reported")):
        files = [
            p.relative_to(ROOT / folder)
            for p in (ROOT / folder).rglob("*")
            if p.suffix in (".yaml", ".csv")
        ]
        assert {f"secateur/{inside}/{file.as_posix()}" for file in files} <= held
    assert "secateur/reporting/templates/report.html" in held
    assert "secateur/reporting/templates/report.js" in held
    assert "secateur/pruners/references.bib" in held
    assert "secateur/shapes/model/model.safetensors" in held
    assert "hydra_plugins/packed.py" in held
    assert not [name for name in held if "train" in name]
    assert not [name for name in held if name.startswith(("eval/", "pruners/", "configs/"))]


def test_the_library_example_runs_without_the_extras(wheel, tmp_path):
    """The environment holds the wheel and what it requires, and nothing of lmms-eval."""
    names = required(wheel)
    assert not names & {"lmms-eval", "datasets", "wandb", "pandas", "hydra-core", "decord"}
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    for name in names:
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or [] if file.parts[0] != ".."}:
            source = Path(str(package.locate_file(top)))
            if not (site / top).exists():
                (site / top).symlink_to(source)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    done = subprocess.run(
        [tmp_path / "env" / "bin" / "python", "-I", "-c", EXAMPLE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "(144,) (16,) False"
