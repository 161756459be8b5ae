"""`inject`: hooks in, hooks out."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import transformers
from transformers import PreTrainedModel

from secateur.budget import Budget
from secateur.families import family_of
from secateur.families.base import Adapter
from secateur.families.contract import is_tested
from secateur.injection.audit import Trace
from secateur.injection.before_llm import BeforeLLM
from secateur.injection.calls import checked_calls, unwrapped
from secateur.injection.encoder import ImageCache
from secateur.injection.hooks import Hooks
from secateur.injection.in_llm import InLLM
from secateur.pruners import InLLMPruner, Pruner

if TYPE_CHECKING:  # few methods need CLIP beside the model
    from secateur.injection.clip import ClipRelevance

Positions = Literal["compact", "original"]
Layout = Literal["anyres", "crops", "fixed2880"]


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
    """Within the block every prefill of `model` uses only the tokens that `pruner` keeps.

    After the block the model is as before.

    Args:
        model: a supported image-text model of transformers, or PEFT's wrapper of one; `generate`
            and the plain forward both work.
        pruner: from `secateur.build`.
        budget: tokens per image (64), retention ("11.1%" or 0.111), either per crop ("128/tile"),
            or "full". Methods inside the language model rank the images of a prompt together,
            within the sum of their budgets.
        positions: `compact` numbers the tokens of the pruned prompt from 0, as the official LLaVA
            codes do; `original` keeps the positions of the unpruned prompt. Default: compact; with
            M-RoPE, which supports only original, original. Methods inside the language model have
            a field of their own instead.
        layout: of LLaVA-NeXT: `anyres`, as Hugging Face packs crops (default), `crops` or
            `fixed2880`, as the papers' codes do; see `secateur.inputs.Inputs`.
        clip: for methods that compare with the question in CLIP's space.
        cache: keeps encoded images for later blocks; without one every call encodes its own.

    Raises:
        ValueError: a model family, wrapper, budget or option that is not supported, a compiled
            model, a block of this model that is still open, or a release of transformers on which
            injection does not work (see `secateur.families.contract`). Errors of the pruner reach
            the caller of the model.
    """
    if not isinstance(pruner, Pruner | InLLMPruner):
        raise ValueError(f"{pruner!r} is no pruner: pass what secateur.pruners.build(name) gives")
    model = unwrapped(model)
    adapter, budget, trace = adapter_for(model, layout), Budget.parse(budget), Trace()
    if isinstance(pruner, InLLMPruner) and positions is not None:
        raise ValueError(
            f"positions={positions!r} is for methods before the language model; pruner "
            f"{pruner.name!r} acts inside it and says itself, in its field `positions`, which "
            f"position ids survivors have ({pruner.positions!r} here): leave it out"
        )
    policy = adapter.POSITIONS[0] if positions is None else positions
    if policy not in adapter.POSITIONS:
        why = (
            "; M-RoPE keeps the coordinates of tokens" if adapter.POSITIONS == ("original",) else ""
        )
        raise ValueError(
            f"positions={positions!r} is not one of {', '.join(adapter.POSITIONS)}, which this "
            f"model takes{why}"
        )
    hooks: Hooks
    if isinstance(pruner, Pruner):
        hooks = BeforeLLM(adapter, pruner, budget, trace, cache, policy == "compact", clip)
    else:
        hooks = InLLM(adapter, pruner, budget, trace, cache)
    with hooks.attached(), checked_calls(model, pruner):
        yield trace


def adapter_for(model: PreTrainedModel, layout: str | None = None) -> Adapter:
    """The adapter of a loaded model, for a release of transformers on which injection works.

    On a release outside `contract.TESTED`, a self-test on a tiny model of the family decides; it
    warns where it passes.

    Args:
        layout: for LLaVA-NeXT; the default is `anyres`.

    Raises:
        ValueError: a family that is not supported, a layout for a family that has none, or a
            release of transformers on which injection does not work.
    """
    model_type = getattr(model.config, "model_type", "?")
    family, version = family_of(model_type), transformers.__version__
    if layout is not None and not family.LAYOUTS:
        raise ValueError(
            f"layout={layout!r} is for LLaVA-NeXT; model type {model_type!r} has one layout only"
        )
    adapter = family.adapter(model, layout)
    if not is_tested(version):
        from secateur.injection import selftest  # tested releases do without it

        selftest.check(model_type, version)
    return adapter
