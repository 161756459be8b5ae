"""What the cells of a sweep share: one loaded model, and the tasks."""

import gc
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur import source
from secateur.settings import EngineSettings, ModelSettings, SuiteSettings

if TYPE_CHECKING:  # these imports take seconds, which a sweep with nothing to do saves
    from lmms_eval.api.task import Task

    from secateur.models import PrunedModel


class ModelPool:
    """Keeps the last model loaded until other settings are asked for."""

    def __init__(self) -> None:
        # what the methods of the jobs to come need of the image encoder
        self.captures: frozenset[str] = frozenset()
        self._settings: Any = None
        self._model: PrunedModel | None = None

    def get(self, settings: ModelSettings, engine: EngineSettings) -> "PrunedModel":
        """The model with its cache. Drops the one before first: memory may not hold both."""
        import torch

        from secateur.models import PrunedModel

        wanted = settings.options(), engine
        if self._model is None or wanted != self._settings:
            self._model = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            model = PrunedModel(
                **settings.options(),
                batch_tokens=0 if engine.strict else engine.batch_tokens,
                cache=engine.encode_cache(),
            )
            model.expect(self.captures)
            source.check_unchanged()  # every model imports modules of its own
            self._model, self._settings = model, wanted
        return self._model


def load_task(name: str, suite: SuiteSettings) -> "Task":
    """A task of a suite; the data of the embedded suite is generated on first use."""
    commit = suite.data_commit(suite.find(name).dataset)
    return _load_task(name, suite.generated, suite.data_root, commit, suite.include_path)


@lru_cache
def _load_task(
    name: str,
    generated: bool,
    data_root: str | None,
    revision: str | None,
    include_path: str | None,
) -> "Task":
    from secateur.tasks.load import load_tasks

    root = Path(data_root) if data_root else None
    if generated:
        from secateur.shapes.datasets import build

        assert root is not None
        build(root)
    return load_tasks([name], root, revision, Path(include_path) if include_path else None)[name]
