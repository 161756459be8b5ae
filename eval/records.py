"""What a results folder says of its cells: identity, results, where a cell ran, why it failed.

The models are plain data. They are as strict as the files should be: a value of another type, a
missing field and an unknown one are errors.
"""

import dataclasses
import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from secateur.settings import ModelIdentity, SuiteIdentity
from secateur.tasks import Task, entry

VERSION = 1  # of record.json; raised when a file of today could be misread


def digest(value: Any) -> str:
    """Hash of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class _Data(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    def as_json(self) -> dict[str, Any]:
        """The content as it is written. Fields that a file did not hold are not added."""
        return self.model_dump(mode="json", exclude_unset=True, by_alias=True)


class MethodIdentity(_Data):
    """A pruning method with its fields, which are attributes here as well."""

    model_config = ConfigDict(extra="allow")

    name: str
    status: str  # official, paper, secondary, reconstruction or baseline
    source: str = ""  # digest of its code; empty for a method that has not run

    @classmethod
    def of(cls, pruner: Any, source: str = "") -> Self:
        """The identity of a built method."""
        # through JSON, which has no tuples, so that it equals what a file gives back
        fields = json.loads(json.dumps(dataclasses.asdict(pruner)))
        return cls(name=pruner.name, status=pruner.status, source=source, **fields)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the method's class."""
        return self.__pydantic_extra__ or {}

    def changed(self, expected: dict[str, Any] | None = None) -> dict[str, Any]:
        """The fields that differ from `expected`, or from the class's defaults.

        Fields that `expected` does not name are compared with the defaults. A field that the
        method got after the record was written counts as its default. Of a method that is not
        registered here, all fields are named.
        """
        from secateur.pruners import REGISTRY  # imports PyTorch, which takes more than a second

        known = dataclasses.fields(REGISTRY[self.name]) if self.name in REGISTRY else ()
        defaults = {field.name: field.default for field in known}
        own, usual = (
            json.loads(json.dumps(fields))
            for fields in (defaults | self.fields, defaults | (expected or {}))
        )
        # a field that the class no longer has is kept: nobody knows what it would be today
        gone = {name: value for name, value in own.items() if name not in defaults}
        return {name: own[name] for name in defaults if own[name] != usual[name]} | gone

    @property
    def label(self) -> str:
        """Name, fields that differ from their defaults, and a status that qualifies its numbers."""
        return self.label_without()

    def label_without(self, *fields: str) -> str:
        """The label, without these fields."""
        shown = {name: value for name, value in self.changed().items() if name not in fields}
        words = [self.name, *(f"{name}={value}" for name, value in shown.items())]
        return " ".join(words) + (f" ({self.status})" if self.qualified else "")

    @property
    def qualified(self) -> bool:
        """Whether tables name its status beside its numbers."""
        return self.status in ("secondary", "reconstruction")


class Identity(_Data):
    """Everything that decides a cell's answers. Equal identities mean the same cell.

    The unpruned model's budget is `full`.
    """

    model: ModelIdentity
    pruner: MethodIdentity
    budget: str
    suite: SuiteIdentity
    task: str
    limit: int | None
    task_seed: int = Field(alias="seed")  # of lmms-eval; files keep the name of the first release
    versions: dict[str, str]
    clip: str = ""  # the weights of CLIP, for a method that compares with the question in it
    definition: str = ""  # digest of a task that is not in the table of tasks
    data: str = ""  # commit of the data set on the hub; empty for a folder, and in old records
    code: str = ""  # digest of the code of secateur that decides answers; empty in old records

    @cached_property
    def digest(self) -> str:
        return digest(self.as_json())

    @property
    def folder(self) -> Path:
        """The cell's folder, relative to the store's."""
        budget = self.budget.replace("%", "pct").replace("/", "-per-")
        name = f"{self.pruner.name}_{budget}_{self.digest[:12]}"
        return Path(self.suite.name, self.model.name, self.task, name)

    @cached_property
    def configuration(self) -> str:
        """Digest of what was asked for, without the versions of code, packages, weights and data.

        Cells of one configuration are versions of one cell. A field that an old record does not
        hold counts as its default.
        """
        method = self.pruner
        fields = method.changed()
        return digest([self._shared, method.name, fields, self.budget, self.task])

    @cached_property
    def setting(self) -> str:
        """Digest of what all cells of one table share. The weights are their version."""
        return digest(self._shared)[:8]

    @property
    def _shared(self) -> list[Any]:
        model = self.model.model_dump(exclude={"weights"})
        return [self.suite.model_dump(), model, self.limit, self.task_seed]

    @property
    def stem(self) -> str:
        """The setting in the names of files of tables."""
        return f"{self.suite.name}_{self.model.name}_{self.limit or 'all'}"

    @property
    def title(self) -> str:
        """The setting in the titles of tables and figures."""
        documents = (
            "all documents" if self.limit is None else f"the first {self.limit} documents per task"
        )
        where = f"suite {self.suite.name}, model {self.model.name}"
        return f"{where}, {documents}, task seed {self.task_seed}"


class Environment(_Data):
    """Where a cell ran. None: not known, or not recorded by the release that wrote the file."""

    python: str
    machine: str
    cores: int | None
    device: str
    commit: str
    lock: str | None = None  # digest of the lock, or "not the lock"
    differences: dict[str, str] | str | None = None  # from the lock, by package
    weights_commit: str | None = None
    data_fingerprint: str | None = None
    batch_tokens: int | None = None  # the smallest of the run: a lack of memory lowers it
    shared_prefixes: int | None = None  # documents that shared the prefill of their image


class Unlisted(_Data):
    """What reports need to know of a task that is not in the table of tasks."""

    metric: str | None  # which of the record's metrics they show; None: the task has no score
    mean: bool  # whether it is the mean of the documents' scores; else there are no such scores


class Results(_Data):
    """The results of a cell.

    Token counts are means over documents: of one prompt, all its images together. `average_tokens`
    is the mean over the layers of the language model as well.
    """

    metrics: dict[str, float]  # as lmms-eval aggregates them
    documents: int
    images: float = 1.0  # per document, mean; old records do not count them
    visual_tokens: float  # before pruning
    kept_tokens: float  # after pruning before the language model
    average_tokens: float
    flops: dict[str, float | None] | None = None  # per document; old records have none
    empty_answers: int = 0
    # the task's own scoring reads nothing from them (see `secateur.tasks.usable`); empty ones too
    unusable_answers: int = 0
    cut_off_answers: int = 0  # ended by the limit of new tokens
    generation_defaults: dict[str, Any] | None = None  # in use, that can change a greedy answer
    rewritten_prompts: int = 0  # documents whose prompt lmms-eval rewrites wrongly
    unlisted: Unlisted | None = None  # of a task that is not in the table of tasks
    started: str  # UTC
    seconds: float  # of all answers; in old records of the last process, with its pauses


class Record(Results):
    """The content of a cell's record.json."""

    version: int = VERSION
    environment: Environment
    identity: Identity
    samples_sha256: str  # of samples.parquet
    seal: str  # digest of all other fields

    @property
    def entry(self) -> Task:
        """The entry of the task."""
        if self.unlisted is None:
            return entry(self.identity.task)
        return entry(self.identity.task, self.unlisted.metric, self.unlisted.mean)


class Failure(_Data):
    """The content of a `.failed.json`: why a cell failed, and with which settings."""

    identity: Identity
    traceback: str
    environment: Environment
    config: dict[str, Any]
