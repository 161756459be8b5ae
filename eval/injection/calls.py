"""Refuses calls of a model that cannot be pruned, by the name of what the caller asked for."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from secateur.families.contract import SPELLINGS
from secateur.pruners import InLLMPruner, Pruner


def unwrapped(model: Any) -> PreTrainedModel:
    """The model of transformers inside a PEFT model; any other model itself.

    Raises:
        ValueError: a wrapper of another kind, a PEFT method that adds tokens to the prompt, or a
            model with compiled code, which would run without hooks.
    """
    if callable(getattr(model, "get_base_model", None)):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "this PEFT model adds tokens of its own to the prompt, and its prompts cannot be "
                "pruned: inject into a model without prompt tuning"
            )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no model of transformers. Pass the model itself, without a "
            "wrapper: of DataParallel its `module`, of torch.compile the model before compilation"
        )
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if hasattr(forward, "_torchdynamo_orig_callable") or module._compiled_call_impl is not None:
            raise ValueError(
                f"{name or type(model).__name__} was compiled with torch.compile, and compiled "
                "code runs without hooks, so that nothing would be pruned: inject into the model "
                "before compilation"
            )
    return model


@contextlib.contextmanager
def checked_calls(model: PreTrainedModel, pruner: Pruner | InLLMPruner) -> Iterator[None]:
    """Within the block `generate` and the forward of `model` refuse options that cannot be pruned.

    After the block the model is as before.
    """
    generate: Any = model.generate

    @functools.wraps(generate)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_options(model, pruner, args, kwargs)
        return generate(*args, **kwargs)

    def refuse_batches(*_args: Any, **_kwargs: Any) -> Any:
        raise ValueError(
            "generate_batch (continuous batching) takes token ids without images, and cannot be "
            "pruned: use generate"
        )

    def refuse_labels(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("labels") is not None:
            raise ValueError(
                "labels have the length of the unpruned prompt, and the logits that of the pruned "
                "one: leave labels out, and compute the loss from the logits"
            )

    replaced = {"generate": checked, "generate_batch": refuse_batches}
    own = {name: vars(model)[name] for name in replaced if name in vars(model)}
    handle = model.register_forward_pre_hook(refuse_labels, with_kwargs=True)
    vars(model).update(replaced)
    try:
        yield
    finally:
        handle.remove()
        for name in replaced:
            del vars(model)[name]
        vars(model).update(own)


def _check_options(
    model: PreTrainedModel,
    pruner: Pruner | InLLMPruner,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Check the options of a call of `generate`, in keywords or in a generation config.

    Raises:
        ValueError: an option that cannot be pruned.
    """
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    config = model.generation_config if config is None else config

    def option(name: str) -> Any:
        return kwargs[name] if name in kwargs else getattr(config, name, None)

    for name in SPELLINGS["cache"]:
        cache = kwargs.get(name)
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                f"generate({name}=...) got a filled cache. A second turn cannot go on from it: "
                "generate takes the length of a pruned cache for a place in the unpruned "
                "conversation. Give the whole conversation with its images again, without a cache"
            )
    # early releases repeat Qwen's images too, and each copy would be pruned by itself
    several = [n for n in ("num_beams", "num_return_sequences") if (option(n) or 1) > 1]
    if several and kwargs.get("pixel_values") is not None:
        raise ValueError(
            f"generate({several[0]}={option(several[0])}): beam search, or several answers per "
            "prompt, repeat the prompt: generate one answer per prompt"
        )
    if option("use_cache") is False:
        raise ValueError(
            "generate(use_cache=False) gives the whole prompt again at every step, and it would be "
            "pruned anew each time: generate with a cache"
        )
    if "static" in str(option("cache_implementation")):
        raise ValueError(
            f"generate(cache_implementation={option('cache_implementation')!r}): pruned prompts "
            "need a dynamic cache; leave the option out"
        )
    if option("prefill_chunk_size") is not None:
        raise ValueError(
            "generate(prefill_chunk_size=...) gives the prompt in pieces, and pruning needs it in "
            "one piece: leave the option out"
        )
    assisted = [
        name
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        if option(name) is not None
    ]
    if assisted and isinstance(pruner, InLLMPruner):
        raise ValueError(
            f"generate({assisted[0]}=...) puts proposed tokens after the prompt, and pruner "
            f"{pruner.name!r}, which acts inside the language model, would rank by them: leave the "
            "option out"
        )
