"""The types of the Hydra config, and the errors for values that do not fit them.

Imports no model code, so that a sweep with nothing to do starts quickly.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.checkpoints import commit_on_hub
from secateur.tasks import Task, find_task

if TYPE_CHECKING:
    from secateur.cache import EncodeCache

Count = Annotated[int, Field(ge=1)]
Gibibytes = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_WORDS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a string",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}


class Settings(BaseModel):
    """A part of the config. Values keep their YAML type: no text becomes a number."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @classmethod
    def checked(cls, values: dict[str, Any]) -> Self:
        """The settings of a composed config.

        Raises:
            ValueError: values that do not fit; the message names each field, its value and what
                is allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            wrong = error.errors()
        schema = cls.model_json_schema()
        raise ValueError("; ".join(dict.fromkeys(_explain(dict(one), schema) for one in wrong)))


class _ModelChoices(Settings):
    """The fields of a model that decide answers."""

    name: str
    family: str
    pretrained: str
    revision: str
    weights: Literal["pretrained", "random"]
    dtype: Literal["auto", "float32", "float16", "bfloat16"]
    attn_implementation: str | None
    prompt: str
    geometry: str
    resize: Literal["pil", "torchvision"] | None
    layout: str | None
    unpruned_layout: str | None
    min_pixels: Count | None
    max_pixels: Count | None
    image_side: Count | None
    text_scope: str
    max_new_tokens: Count | None
    generation: Literal["checkpoint", "greedy"]
    clip: str | None
    positions: Literal["compact", "original"]


class ModelIdentity(_ModelChoices):
    """A model in the identity of a cell."""

    # old records do not have these
    generation: Literal["checkpoint", "greedy"] = "checkpoint"
    unpruned_layout: str | None = None
    weights: str  # type: ignore[assignment] # names the files of the weights


class ModelSettings(_ModelChoices):
    """A model as in configs/model. What its fields mean: `secateur.models.PrunedModel`.

    Fields of type `str` whose values depend on the family are checked when the model is loaded.
    """

    device: str
    budgets: list[int | float | str]  # of the papers' tables; scripts and experiments read them
    pruner_fields: dict[str, dict[str, Any]] = {}  # configs/pruner reads them

    def identity(self, weights: str) -> ModelIdentity:
        """The identity of this model with these weights."""
        own = self.model_dump(exclude={"device", "budgets", "pruner_fields"})
        return ModelIdentity(**own | {"weights": weights})

    def options(self) -> dict[str, Any]:
        """The arguments of `PrunedModel`."""
        return self.model_dump(exclude={"positions", "budgets", "pruner_fields"})


class SuiteIdentity(Settings):
    """A suite in the identity of a cell."""

    name: str
    revision: str


class SuiteSettings(SuiteIdentity):
    """A suite of tasks as in configs/suite."""

    data_root: str | None  # folder of the data sets; None: the Hugging Face hub
    tasks: list[str]
    limit: Count | None
    include_path: str | None = None  # folder with YAML files of other tasks

    @property
    def generated(self) -> bool:
        """Whether the data sets are generated, so that only the suite's tasks have any."""
        return self.name == "shapes"

    def find(self, task: str) -> Task:
        """The entry of a task.

        Raises:
            ValueError: as `find_task`.
        """
        return find_task(task, Path(self.include_path) if self.include_path else None)

    def data_commit(self, dataset: str) -> str | None:
        """The commit of a data set on the hub; None for data in a folder."""
        if self.data_root is not None or Path(dataset).is_absolute():
            return None
        return commit_on_hub(dataset, self.revision, "dataset")

    def identity(self) -> SuiteIdentity:
        """The suite without the place of its data."""
        return SuiteIdentity(name=self.name, revision=self.revision)


class EngineSettings(Settings):
    """How a model runs. In float32 none of it changes an answer."""

    batch_tokens: Annotated[int, Field(ge=0)]
    strict: bool
    cache: Literal["off", "memory", "disk"]
    cache_gb: Gibibytes
    cache_disk_gb: Gibibytes
    results: Annotated[Path, Field(strict=False)]

    def encode_cache(self) -> "EncodeCache":
        from secateur.cache import EncodeCache

        return EncodeCache(
            limit_bytes=0 if self.cache == "off" else int(self.cache_gb * 2**30),
            folder=self.results / "cache" if self.cache == "disk" else None,
            disk_limit_bytes=int(self.cache_disk_gb * 2**30),
        )


def _explain(error: dict[str, Any], schema: dict[str, Any]) -> str:
    """What is wrong with a field, in the words of the command line."""
    if "error" in error.get("ctx", {}):  # raised by a check of ours, which names the fix
        return str(error["ctx"]["error"])
    parts, path = list(error["loc"]), []
    if error["type"] == "extra_forbidden":
        return f"{'.'.join(map(str, parts))} is not a setting; configs/ lists all settings"
    at = schema
    for part in parts:
        at = schema["$defs"][at["$ref"].split("/")[-1]] if "$ref" in at else at
        inner = at.get("properties", {}).get(part) if isinstance(part, str) else at.get("items")
        if inner is None:  # the alternatives of one field follow
            break
        at = inner
        path.append(str(part))
    value = error["input"]
    if error["type"] == "missing":
        return f"{'.'.join(path)} is missing"
    return f"{'.'.join(path)}={'null' if value is None else value} is not {_allowed(at)}"


def _allowed(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(map(_allowed, schema["anyOf"]))
    if "enum" in schema:
        return f"one of {', '.join(map(repr, schema['enum']))}"
    words = _WORDS[schema["type"]]
    if "minimum" in schema:
        low = f"{schema['minimum']:g}"
        high = f"{schema['maximum']}]" if "maximum" in schema else "inf)"
        words += f" in [{low}, {high}"
    return words
