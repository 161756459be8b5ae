"""The model `secateur` of lmms-eval's own command line."""

import os
from typing import Any

from secateur.budget import Budget
from secateur.cache import EncodeCache
from secateur.models import PrunedModel
from secateur.pruners import build
from secateur.pruners.plugins import load_plugins

_FIELD = "pruner."  # before a pruner's own fields: pruner.order=picked


class Secateur(PrunedModel):
    """A pruned model with all its settings in `model_args`.

    So lmms-eval's response cache never mixes methods.

    `lmms-eval --model secateur --tasks pope
    --model_args pretrained=...,pruner=scope,budget=64,pruner.alpha=1.5`

    Args:
        pruner: the method.
        budget: tokens per image, or a retention.
        batch_size: must be 1; `batch_tokens` sets the size of batches.
        plugins: files with methods of your own, separated as in PATH.
        cache_gb: limit of the image encoder's output kept in memory.
        fields: `pruner.<field>` of the method, all others of `PrunedModel`.

    Raises:
        ValueError: an unknown field, a batch size, several processes.
    """

    def __init__(
        self,
        pretrained: str,
        pruner: str = "none",
        budget: str | int | float = "full",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        plugins: str = "",
        cache_gb: float = 4,
        **fields: Any,
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                "secateur runs in one process here; its own sweep spreads over several "
                "(README, more machines)"
            )
        if str(batch_size) != "1" or max_batch_size:
            raise ValueError(
                f"batch_size={batch_size}: secateur batches by positions; "
                "set batch_tokens=8192 in --model_args"
            )
        options = {
            name.removeprefix(_FIELD): fields.pop(name)
            for name in list(fields)
            if name.startswith(_FIELD)
        }
        load_plugins(plugins)
        method, positions = build(pruner, **options), fields.pop("positions", None)
        try:
            super().__init__(
                pretrained,
                device=device or "auto",
                cache=EncodeCache(int(cache_gb * 2**30)),
                **fields,
            )
        except TypeError as error:  # an unknown keyword
            raise ValueError(
                f"--model_args: {error}; a pruner's own fields are written {_FIELD}name=value"
            ) from error
        self.use(method, Budget.parse(budget), positions)
