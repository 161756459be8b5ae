"""Finished cells with known effects, as a sweep would have stored them."""

import dataclasses
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from secateur.pruners import build
from secateur.reporting.comparison import Cell
from secateur.tasks import TASKS

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CATEGORIES = ["OCR", "count", "color", "code_reasoning", "text_translation"]
PER_IMAGE = {"pope": 10, "gqa": 10, "mme": 2}


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
):
    settings = model_settings(model)
    overrides = settings.get("pruner_fields", {}).get(method, {})
    for name in ("budgets", "device", "pruner_fields"):
        settings.pop(name, None)
    pruner = build(method, **overrides, **fields)
    return {
        "model": settings | {"weights": "w"},
        "pruner": {
            "name": method,
            "status": pruner.status,
            **dataclasses.asdict(pruner),
            "source": "s",
        },
        "budget": budget,
        "suite": {"name": suite, "revision": "main"},
        "task": task,
        "limit": limit,
        "seed": 0,
        "versions": {"secateur": "0.1.0"},
    }


def rows(task: str, share: float, documents: int = 2000, shift: int = 0) -> pd.DataFrame:
    """Documents of which `share` are answered right, the easiest first.

    So a weaker method fails where a stronger one does. For MME whole pairs are right or wrong. Of
    POPE's right answers as many are yes as no. `shift` makes other documents easy.
    """
    docs = np.arange(documents)
    images = docs // PER_IMAGE.get(task, 1)
    unit = images if task == "mme" else docs // 2 if task == "pope" else docs
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
    record = {
        "identity": identity(model, method, budget, task, **options),
        "metrics": {},
        "images": images,
        "visual_tokens": full * images,
        "average_tokens": tokens * images,
        "environment": {"commit": "abc"},
    }
    for metric in TASKS[task].metrics.values():
        named = (
            samples.assign(category=samples["image_id"].str.split("/").str[0])
            if task == "mme"
            else samples
        )
        if not metric.stratified or "category" in named:
            record["metrics"][metric.stored] = (
                float(metric.value(metric.terms(named).sum(axis=0))) / metric.factor
            )
    return Cell(record, samples)
