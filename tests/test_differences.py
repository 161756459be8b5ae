"""The page of differences names existing fields, and all that decide what a model sees."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from secateur.prompts import PROMPTS
from secateur.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
PAGE = (ROOT / "docs" / "DIFFERENCES.md").read_text()


def fields(group: str) -> set[str]:
    return {
        f"{group}.{key}"
        for path in (CONFIGS / group).glob("*.yaml")
        for key in OmegaConf.create(path.read_text())
        if key != "defaults"
    }


@pytest.mark.parametrize("group", ["model", "pruner", "suite"])
def test_fields_it_names_exist(group):
    named = set(re.findall(rf"`({group}\.\w+)`", PAGE))
    assert named
    assert named <= fields(group)


def test_it_names_every_field_that_decides_what_a_model_sees():
    about_the_run = {
        "name",
        "family",
        "pretrained",
        "weights",
        "device",
        "budgets",
        "pruner_fields",
    }
    assert fields("model") - {f"model.{field}" for field in about_the_run} == set(
        re.findall(r"`(model\.\w+)`", PAGE)
    )


def test_names_it_quotes_exist():
    assert all(f"`{prompt}`" in PAGE for prompt in PROMPTS)
    assert TASKS["mme"].named_metrics({"mme_perception_score,none": 1.0}).keys() <= set(
        re.findall(r"`(\w+)`", PAGE)
    )
    assert all((ROOT / "docs" / link).exists() for link in re.findall(r"\]\(([^)#]+)\)", PAGE))
