"""Finished cells with known effects, as a sweep would have stored them."""

import zlib
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from secateur.pruners import build
from secateur.records import Environment, Identity, MethodIdentity, Record, Results
from secateur.reporting.comparison import Cell
from secateur.settings import ModelSettings, SuiteIdentity
from secateur.store import Store
from secateur.tasks import TASKS

T = TypeVar("T", Record, Identity)

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CATEGORIES = ["OCR", "count", "color", "code_reasoning", "text_translation"]
PER_IMAGE = {"pope": 10, "gqa": 10, "mme": 2, "mmbench_en": 3, "mmbench_cn": 3}
ENVIRONMENT = Environment(python="3.11.7", machine="x86_64", cores=2, device="cpu", commit="abc")


def model_settings(model: str) -> dict[str, Any]:
    """A config of configs/model, composed with the file that all models share."""
    return OmegaConf.to_container(_composed(model).model)


@cache
def _composed(model: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("sweep", [f"model={model}"])


def identity(
    model: str,
    method: str,
    budget: str,
    task: str,
    suite: str = "hub",
    limit: int | None = None,
    **fields: Any,
) -> Identity:
    settings = ModelSettings.checked(model_settings(model))
    return Identity(
        model=settings.identity("w"),
        pruner=MethodIdentity.of(
            build(method, **settings.pruner_fields.get(method, {}), **fields), "s"
        ),
        budget=budget,
        suite=SuiteIdentity(name=suite, revision="main"),
        task=task,
        limit=limit,
        seed=0,
        versions={"secateur": "0.1.0"},
    )


def altered(content: T, changes: dict[str, Any]) -> T:
    """A record or identity with other values, by dotted names. Ellipsis: without that value."""
    values = content.as_json()
    for name, value in changes.items():
        *path, last = name.split(".")
        place = reduce(getitem, path, values)
        place[last] = value
        if value is ...:
            del place[last]
    return type(content).model_validate(values)


def changed(cells: list[Cell], changes: dict[str, Any]) -> list[Cell]:
    """The cells with other values in their records, as `altered` takes them."""
    return [cell._replace(record=altered(cell.record, changes)) for cell in cells]


def rows(task: str, share: float, documents: int = 2000, shift: int = 0) -> pd.DataFrame:
    """Documents of which `share` are answered right, the easiest first.

    So a weaker method fails where a stronger one does. For MME whole pairs are right or wrong, for
    MMBench whole circles. Of
    POPE's right answers as many are yes as no. `shift` makes other documents easy.
    """
    docs = np.arange(documents)
    images = docs // PER_IMAGE.get(task, 1)
    unit = images if PER_IMAGE.get(task) in (2, 3) else docs // 2 if task == "pope" else docs
    order = np.random.default_rng(zlib.crc32(task.encode()) + shift).permutation(unit.max() + 1)
    right = order[unit] < round(share * len(order))
    targets = np.where(docs % 2, "no", "yes")
    frame = pd.DataFrame(
        {
            "doc_id": docs,
            "image_id": [f"{CATEGORIES[image % 5]}/{image}" for image in images]
            if task == "mme"
            else images.astype(str),
            "target": targets,
            "answer": np.where(right, targets, np.where(docs % 2, "yes", "no")),
            "score": right.astype(float),
        }
    )
    if task in ("mmbench_en", "mmbench_cn"):  # circles of three documents
        return frame.assign(unit=[f"{image}/{doc % 3}" for doc, image in enumerate(images)])
    return frame.assign(category=[f"c{doc % 18}" for doc in docs]) if task == "mmstar" else frame


def cell(
    model: str,
    method: str,
    budget: str,
    task: str,
    samples: pd.DataFrame,
    tokens: float,
    full: int = 576,
    images: float = 1.0,
    **options: Any,
) -> Cell:
    """A cell whose record agrees with its samples; `tokens` per image, `images` per document."""
    metrics = {}
    for metric in TASKS[task].metrics.values():
        named = (
            samples.assign(category=samples["image_id"].str.split("/").str[0])
            if task == "mme"
            else samples
        )
        if not metric.stratified or "category" in named:
            total = float(metric.value(metric.terms(named).sum(axis=0)))
            metrics[metric.stored] = total / metric.factor
    record = Record(
        metrics=metrics,
        documents=len(samples),
        images=images,
        visual_tokens=full * images,
        kept_tokens=tokens * images,
        average_tokens=tokens * images,
        started="2026-01-01T00:00:00Z",
        seconds=60.0,
        environment=ENVIRONMENT,
        identity=identity(model, method, budget, task, **options),
        samples_sha256="",
        seal="",
    )
    return Cell(record, samples)


def save(results: Path, cell: Cell) -> Path:
    """Write a cell into a results folder, as a sweep does; returns the cell's folder."""
    content = cell.record.as_json()
    own = {name: value for name, value in content.items() if name in Results.model_fields}
    stored = Store(results).cell(cell.record.identity)
    stored.write(Results(**own), cell.record.environment, cell.rows)
    return stored.folder
