"""`inject`: hooks in, hooks out."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from transformers import PreTrainedModel

from secateur.budget import Budget
from secateur.injection.calls import Calls, Trace
from secateur.injection.encoder import ImageCache
from secateur.injection.entrance import Entrance
from secateur.injection.families import adapter_for
from secateur.injection.layers import Layers
from secateur.pruners import InLLMPruner, Pruner

if TYPE_CHECKING:  # a pruned model needs no CLIP beside it as a rule
    from secateur.injection.clip import ClipRelevance

Positions = Literal["compact", "original"]
Layout = Literal["anyres", "fixed2880"]


@contextlib.contextmanager
def inject(
    model: PreTrainedModel,
    pruner: Pruner | InLLMPruner,
    budget: Budget | int | float | str,
    positions: Positions | None = None,
    layout: Layout | None = None,
    clip: "ClipRelevance | None" = None,
    cache: ImageCache | None = None,
) -> Iterator[Trace]:
    """Within the block every prefill of `model` goes on with the tokens `pruner` keeps; behind it the model is as before.

    Args:
        model: a supported image-text model of transformers; `generate` and the plain forward both work.
        pruner: from `secateur.pruners.build`.
        budget: tokens per image (64), retention ("11.1%" or 0.111), either per crop ("128/tile"), or "full". Methods inside the
            language model rank the images of a prompt together, within the sum of their budgets.
        positions: `compact` numbers the shortened prompt through, as the official LLaVA codes do; `original` keeps the
            positions of the unpruned prompt. Default: compact; with M-RoPE, which knows the latter only, original. Methods
            inside the language model have a field of their own instead.
        layout: of LLaVA-NeXT: `anyres`, as Hugging Face packs crops (default), or `fixed2880`, as the papers' codes do.
        clip: for methods that compare with the question in CLIP's space.
        cache: for blocks that meet the same images again; without one every call encodes its own.

    Raises:
        ValueError: a model family, budget or option that is not supported, a block of this model that is still open, or a
            release of transformers on which injection does not work (`secateur.injection.contract`). Errors of the pruner reach the
            caller of the model.
    """
    if not isinstance(pruner, Pruner | InLLMPruner):
        raise ValueError(f"{pruner!r} is no pruner: pass what secateur.pruners.build(name) gives")
    adapter, budget, trace = adapter_for(model, layout), Budget.parse(budget), Trace()
    if isinstance(pruner, InLLMPruner) and positions is not None:
        raise ValueError(
            f"positions={positions!r} is for methods before the language model; pruner {pruner.name!r} acts inside it and says "
            f"itself, in its field `positions`, which position ids survivors have ({pruner.positions!r} here): leave it out"
        )
    policy = adapter.POSITIONS[0] if positions is None else positions
    if policy not in adapter.POSITIONS:
        why = (
            "; M-RoPE keeps the coordinates of tokens" if adapter.POSITIONS == ("original",) else ""
        )
        raise ValueError(
            f"positions={positions!r} is not one of {', '.join(adapter.POSITIONS)}, which this model takes{why}"
        )
    calls: Calls
    if isinstance(pruner, Pruner):
        calls = Entrance(
            adapter, pruner, budget, trace, cache, compact=policy == "compact", clip=clip
        )
    else:
        calls = Layers(adapter, pruner, budget, trace, cache)
    with calls.attached():
        yield trace
