"""One Hydra job: its checked config. Imports no model code."""

import dataclasses
import re
from functools import cached_property
from typing import Annotated, Any, Self

from omegaconf import DictConfig, OmegaConf
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    model_validator,
)

from secateur import cell
from secateur.budget import Budget
from secateur.pruners import InLLMPruner, Pruner, build
from secateur.pruners.plugins import load_plugins
from secateur.settings import Count, EngineSettings, ModelSettings, SuiteSettings
from secateur.store import Store, StoredCell
from secateur.tasks import canonical


def _parse_shard(text: Any) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", str(text))
    number, count = map(int, match.groups()) if match else (0, 0)
    if number >= count:
        raise ValueError(
            f"shard={text}: write number/count, with numbers from 0: 0/4, 1/4, 2/4, 3/4"
        )
    return number, count


class Job(EngineSettings):
    """The settings of one Hydra job: one model, one method, one budget, several tasks."""

    model: ModelSettings
    plugins: list[str] | str  # files with methods, loaded before this is checked
    pruner: Annotated[
        Pruner | InLLMPruner,
        PlainValidator(lambda fields: build(**fields)),
        PlainSerializer(lambda pruner: {"name": pruner.name, **dataclasses.asdict(pruner)}),
    ]
    budget: Annotated[Budget, PlainValidator(Budget.parse), PlainSerializer(str)]
    suite: SuiteSettings
    tasks: Annotated[
        list[str],
        BeforeValidator(lambda tasks: [tasks] if isinstance(tasks, str) else tasks or []),
        AfterValidator(lambda tasks: [canonical(name) for name in tasks]),
    ]
    limit: Count | None
    task_seed: Annotated[int, Field(ge=0, le=2**32 - 1)]
    shard: Annotated[  # number and count
        tuple[int, int],
        PlainValidator(_parse_shard),
        PlainSerializer(lambda shard: "{}/{}".format(*shard)),
    ]
    retry_failed: bool
    logger: dict[str, Any]  # checked by the logger
    reported: dict[str, Any] | None = None  # of an experiment: the tables it reproduces

    @classmethod
    def of(cls, config: DictConfig) -> Self:
        """Check a composed config.

        Raises:
            ValueError, OSError: a field that makes no sense, a folder that cannot be written; the
                message names the fix.
        """
        values: Any = OmegaConf.to_container(config, resolve=True)
        load_plugins(values["plugins"] or [])  # a worker's process has not loaded them
        if values["limit"] == "suite":
            values["limit"] = values["suite"]["limit"]
        job = cls.checked(values)
        job.store  # noqa: B018 - fails here if the folder cannot be written
        return job

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        suite, known = self.suite.name, ", ".join(self.suite.tasks)
        if not self.tasks:
            raise ValueError(f"tasks={self.tasks} names no task; suite {suite!r} has {known}")
        for task in self.tasks:
            if self.tasks.count(task) > 1:
                raise ValueError(f"tasks={self.tasks} names {task} twice; name it once")
            entry = self.suite.find(task)
            if self.suite.generated and entry.listed and task not in self.suite.tasks:
                raise ValueError(
                    f"tasks={self.tasks}: {task} is not in suite {suite!r}, whose data are "
                    f"generated; it has {known}. Set suite=hub for the real data"
                )
            entry.check_limit(self.limit)
        return self

    @cached_property
    def store(self) -> Store:
        return Store(self.results)

    @property
    def engine(self) -> EngineSettings:
        """The settings that decide how the model runs."""
        return EngineSettings(**{name: getattr(self, name) for name in EngineSettings.model_fields})

    def cell(self, task: str, pruner: Pruner | InLLMPruner | None = None) -> StoredCell:
        """This job's cell of a task, or the same cell under another method."""
        identity = cell.identity(
            self.model,
            pruner or self.pruner,
            self.budget,
            self.suite,
            task,
            self.limit,
            self.task_seed,
        )
        return self.store.cell(identity)
