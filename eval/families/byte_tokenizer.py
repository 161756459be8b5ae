"""A tokenizer of bytes, for models without weights."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(
    vocabulary: int, special: dict[str, int], begin: str | None = None, **named: Any
) -> PreTrainedTokenizerFast:
    """Special tokens at their ids, bytes at the first free ids, fillers at the rest.

    Args:
        special: token -> id.
        begin: the special token that starts every text.
        named: other arguments of the tokenizer class.
    """
    free = iter(sorted(set(range(vocabulary)) - set(special.values())))
    ids = dict(special)
    ids |= {byte: next(free) for byte in sorted(pre_tokenizers.ByteLevel.alphabet())}
    ids |= {f"[{number}]": number for number in free}
    core = Tokenizer(models.BPE(vocab=ids, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    if begin is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, ids[begin])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        **named,
    )
