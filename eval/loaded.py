"""What the cells of one process share: the model, which stays loaded until another is asked for, and the tasks."""

import gc
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.job import NOT_OF_THE_MODEL

if TYPE_CHECKING:  # importing these takes seconds, which a sweep with nothing to do need not spend
    from lmms_eval.api.task import Task

    from secateur.models import PrunedModel

_MODELS: dict[str, "PrunedModel"] = {}  # one at most, by its settings


def model(settings: dict[str, Any], engine: dict[str, Any]) -> "PrunedModel":
    """The model of a job, with its cache; the one before is dropped first, since memory may not hold both."""
    import torch

    from secateur.cache import EncodeCache
    from secateur.models import PrunedModel

    options = {
        key: value for key, value in settings.items() if key not in ("positions", *NOT_OF_THE_MODEL)
    }
    wanted = json.dumps([options, engine])
    if wanted not in _MODELS:
        _MODELS.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        folder = engine["folder"] and Path(engine["folder"])
        cache = EncodeCache(engine["limit_bytes"], folder, engine["disk_limit_bytes"])
        _MODELS[wanted] = PrunedModel(**options, batch_tokens=engine["batch_tokens"], cache=cache)
    return _MODELS[wanted]


def task(name: str, suite: dict[str, Any]) -> "Task":
    """A task of a suite, with its data in place."""
    return _task(name, suite["name"], suite["data_root"])


@lru_cache
def _task(name: str, suite: str, data_root: str | None) -> "Task":
    from secateur.tasks.load import load_tasks

    root = Path(data_root) if data_root else None
    if suite == "shapes":
        from secateur.shapes.datasets import build

        assert root is not None
        build(root)
    return load_tasks([name], root)[name]
