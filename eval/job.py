"""The checked settings of one Hydra job. Imports no model code, so that a sweep with nothing to do is quick."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf

from secateur import cell
from secateur.budget import Budget
from secateur.checkpoints import fingerprint
from secateur.pruners import InLLMPruner, Pruner, build
from secateur.pruners.fields import Range, describe, fits
from secateur.store import Store
from secateur.tasks import find_task

_FIELDS: dict[str, Any] = {  # what a setting may hold
    "limit": Annotated[int, Range(1)] | None,
    "seed": Annotated[int, Range(0, 2**32 - 1)],
    "batch_tokens": Annotated[int, Range(0)],
    "strict": bool,
    "cache": Literal["off", "memory", "disk"],
    "cache_gb": Annotated[float, Range(0)],
    "cache_disk_gb": Annotated[float, Range(0)],
    "retry_failed": bool,
    "model.dtype": Literal["auto", "float32", "float16", "bfloat16"],
    "model.weights": Literal["pretrained", "random"],
    "model.max_new_tokens": Annotated[int, Range(1)] | None,
}
NOT_OF_THE_MODEL = ("budgets", "pruner_fields")  # what its config holds for grids and pruners


@dataclass(frozen=True)
class Job:
    """The checked settings of one Hydra job: one model, one method, one budget, several tasks."""

    model: dict[str, Any]
    pruner: Pruner | InLLMPruner
    budget: Budget
    suite: dict[str, Any]
    tasks: list[str]
    limit: int | None
    seed: int
    shard: tuple[int, int]  # number and count
    engine: dict[
        str, Any
    ]  # how the model runs, which changes no answer: batch_tokens, cache, its limits and folder
    store: Store
    retry_failed: bool
    config: dict[str, Any]  # what all this came from

    @classmethod
    def of(cls, config: DictConfig) -> "Job":
        """Check a composed config.

        Raises:
            ValueError, OSError: a field that makes no sense, a folder that cannot be written; the message names the fix.
        """
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        limit = settings["limit"] = (
            settings["suite"]["limit"] if settings["limit"] == "suite" else settings["limit"]
        )
        for name, hint in _FIELDS.items():
            value = (
                settings["model"][name.removeprefix("model.")]
                if name.startswith("model.")
                else settings[name]
            )
            if not fits(hint, value):
                raise ValueError(
                    f"{name}={'null' if value is None else value} is not {describe(hint).replace('None', 'null')}"
                )
        tasks = (
            [settings["tasks"]] if isinstance(settings["tasks"], str) else settings["tasks"] or []
        )
        suite, known = settings["suite"]["name"], ", ".join(settings["suite"]["tasks"])
        if not tasks:
            raise ValueError(f"tasks={tasks} names no task; suite {suite!r} has {known}")
        if unknown := sorted(set(map(str, tasks)) - set(settings["suite"]["tasks"])):
            raise ValueError(
                f"tasks={tasks}: {', '.join(unknown)} is not in suite {suite!r}; it has {known}"
            )
        for task in tasks:
            find_task(task).check_limit(limit)
        return cls(
            model=settings["model"],
            pruner=build(**settings["pruner"]),
            budget=Budget.parse(settings["budget"]),
            suite=settings["suite"],
            tasks=tasks,
            limit=limit,
            seed=settings["seed"],
            shard=_shard(settings["shard"]),
            engine=_engine(settings),
            store=Store(Path(settings["results"])),
            retry_failed=settings["retry_failed"],
            config=settings,
        )

    def identity(self, task: str, pruner: Pruner | InLLMPruner | None = None) -> dict[str, Any]:
        """The identity of this job's cell of a task, or of the same cell under another method."""
        model = {
            key: value
            for key, value in self.model.items()
            if key not in ("device", *NOT_OF_THE_MODEL)
        }
        suite = {key: self.suite[key] for key in ("name", "revision")}
        weights = fingerprint(self.model["pretrained"], self.model["revision"])
        if self.model["clip"]:
            weights += f" clip {fingerprint(self.model['clip'], 'main')}"
        return cell.identity(
            model, weights, pruner or self.pruner, self.budget, suite, task, self.limit, self.seed
        )


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", str(text))
    number, count = map(int, match.groups()) if match else (0, 0)
    if number >= count:
        raise ValueError(
            f"shard={text}: write number/count, with numbers from 0: 0/4, 1/4, 2/4, 3/4"
        )
    return number, count


def _engine(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "batch_tokens": 0 if settings["strict"] else settings["batch_tokens"],
        "limit_bytes": 0 if settings["cache"] == "off" else int(settings["cache_gb"] * 2**30),
        "disk_limit_bytes": int(settings["cache_disk_gb"] * 2**30),
        "folder": str(Path(settings["results"]) / "cache") if settings["cache"] == "disk" else None,
    }
