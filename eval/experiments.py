"""The experiments of configs/experiment: the jobs that each of them composes."""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from secateur.job import Job
from secateur.paths import CONFIGS
from secateur.settings import ModelIdentity

FOLDER = CONFIGS / "experiment"
# fields of a model that say which checkpoint it is, or have no say in the other models
_CHECKPOINT = {"name", "family", "pretrained", "revision", "weights", "clip"}


def of_papers() -> list[str]:
    """Names of the experiments that reproduce papers, not of those of the embedded suite."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("shapes"))


def written(experiment: str) -> DictConfig:
    """An experiment's file as it is written."""
    return _loaded(FOLDER / f"{experiment}.yaml")


def _loaded(path: Path) -> DictConfig:
    found = path.stat()
    return _parsed(path, (found.st_mtime_ns, found.st_size))


@cache
def _parsed(path: Path, version: tuple[int, int]) -> DictConfig:
    """A file, parsed once until it is changed; callers leave it as it is."""
    config = OmegaConf.load(path)
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


def settings(experiment: str) -> dict[str, Any]:
    """The settings of an experiment that decide its numbers, by their names on the command line.

    These are its model and the fields of the model that have a value, the tasks, the limit and what
    it sweeps.
    """
    config = written(experiment)
    (model,) = (one["override /model"] for one in config.defaults if "override /model" in one)
    fields = _plain("_base") | _plain(model) | dict(config.model)
    chosen = {
        f"model.{name}": fields[name]
        for name in ModelIdentity.model_fields
        if name not in _CHECKPOINT and fields[name] is not None
    }
    swept = {name: ",".join(map(str, values)) for name, values in grid(experiment).items()}
    tasks = swept.pop("tasks", None) or ",".join(config.tasks)
    return {"model": model} | chosen | {"tasks": tasks, "limit": config.limit} | swept


def _plain(model: str) -> dict[str, Any]:
    file = _loaded(CONFIGS / "model" / f"{model}.yaml")
    return {str(name): None if OmegaConf.is_missing(file, name) else file[name] for name in file}


def stated(experiment: str) -> dict[str, str]:
    """Which of `settings` the source states: name -> where. All others are our choice.

    The tables that an experiment reproduces state its model, its tasks and what it sweeps. What
    else the source states is in the file's `reported.stated`.

    Raises:
        ValueError: `reported.stated` names no setting of the experiment, or one without a place.
    """
    source = written(experiment).get("reported")
    if source is None:
        return {}
    found = dict.fromkeys(["model", "tasks", *grid(experiment)], ", ".join(source.tables))
    for name, place in source.get("stated", {}).items():
        if name not in settings(experiment):
            raise ValueError(
                f"{experiment}: reported.stated names {name!r}, which is no setting of the "
                f"experiment; they are {', '.join(settings(experiment))}"
            )
        if not isinstance(place, str) or not place:
            raise ValueError(
                f"{experiment}: reported.stated.{name} is {place!r}; write where the source says "
                "so, as paper, Section 4.1"
            )
        found[name] = place
    return found


def origins(experiment: str) -> list[str]:
    """Two sentences: the settings that the source states, by place, and those that we chose."""
    own, places = settings(experiment), stated(experiment)
    groups: dict[str, list[str]] = {}
    for name, place in places.items():
        text = f"{name}={own[name]}" if name.startswith("model.") else name
        groups.setdefault(place, []).append(text)
    ours = [
        f"{name}={'null' if own[name] is None else own[name]}" for name in own if name not in places
    ]
    listed = "; ".join(f"{', '.join(texts)} ({place})" for place, texts in groups.items())
    return [f"The source states: {listed or 'nothing'}.", f"Chosen by us: {', '.join(ours)}."]


def jobs(experiment: str, results: Path) -> list[Job]:
    """The Hydra jobs of an experiment.

    Composing takes long, so configs that differ in their method and budget alone are composed once.
    """
    fields = grid(experiment)
    budgets = fields.pop("budget", [])
    # not those with fields of a method, as pruner={alpha:2} or pruner.alpha=2
    files: list[Path | None] = [None]
    named = [CONFIGS / "pruner" / f"{pruner}.yaml" for pruner in fields.get("pruner", [])]
    if not any(key.startswith("pruner.") for key in fields) and all(map(Path.is_file, named)):
        files = [*named] or files
        fields.pop("pruner", None)
    found = []
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for values in product(*fields.values()):
            swept = [f"{key}={value}" for key, value in zip(fields, values, strict=True)]
            config = compose("sweep", [f"experiment={experiment}", f"results={results}", *swept])
            for file, budget in product(files, budgets or [config.budget]):
                if file:
                    config.pruner = OmegaConf.load(file)
                config.budget = budget
                found.append(Job.of(config))
    return found
