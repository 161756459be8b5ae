"""The experiments of configs/experiment: the jobs that each of them composes."""

from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from secateur.job import Job
from secateur.paths import CONFIGS

FOLDER = CONFIGS / "experiment"


def of_papers() -> list[str]:
    """Names of the experiments that reproduce papers, not of those of the embedded suite."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("shapes"))


def written(experiment: str) -> DictConfig:
    """An experiment's file as it is written."""
    config = OmegaConf.load(FOLDER / f"{experiment}.yaml")
    assert isinstance(config, DictConfig)
    return config


def grid(experiment: str) -> dict[str, list[Any]]:
    """The swept fields of an experiment, and the values of each as the command line takes them."""
    params = written(experiment).hydra.sweeper.params
    lines = [f"{key}={value}" for key, value in params.items()]
    return {
        one.key_or_group: list(one.sweep_string_iterator())
        if one.is_sweep_override()
        else [one.value()]
        for one in OverridesParser.create().parse_overrides(lines)
    }


def jobs(experiment: str, results: Path) -> list[Job]:
    """The Hydra jobs of an experiment.

    The configs of jobs that differ in their budget alone are composed once.
    """
    fields = grid(experiment)
    budgets = fields.pop("budget", [])
    found = []
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for values in product(*fields.values()):
            swept = [f"{key}={value}" for key, value in zip(fields, values, strict=True)]
            given = [f"experiment={experiment}", f"results={results}", *swept]
            config = compose("sweep", given)
            for budget in budgets or [config.budget]:
                config.budget = budget
                found.append(Job.of(config))
    return found
