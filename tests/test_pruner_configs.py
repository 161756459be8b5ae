"""Every pruner has a YAML with exactly its fields and defaults, and every YAML is a pruner."""

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from secateur.pruners import REGISTRY

CONFIGS = Path(__file__).parents[1] / "configs" / "pruner"


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_yaml_states_the_fields_and_defaults(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    defaults = {"name": name} | {
        field.name: field.default for field in dataclasses.fields(REGISTRY[name])
    }
    defaults = {
        key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()
    }
    config = OmegaConf.to_container(
        OmegaConf.create(text), resolve=True
    )  # apart from any model, which may decide a field
    assert config == defaults
    assert list(config) == list(defaults)
    assert text.startswith("# ")
    assert f"pruner={name}" in text.splitlines()[1]


def test_every_yaml_is_a_pruner() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(REGISTRY)
