"""FLOPs of the phases of an answer, from a configuration and token counts alone.

A multiply-add is two FLOPs. Only matrix products count, and attention counts every pair of
positions although a causal mask forbids half of them. Both are as in torch.utils.flop_counter, and
the tests require equality with it. `conventions` gives the other counts of the literature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from secateur.families import family_of
from secateur.families.base import Family
from secateur.pruners import InLLMPruner, Pruner
from secateur.pruners.base import ImageShape
from secateur.pruners.in_llm import PromptShape
from secateur.pruners.tower import TowerPruner

# (rows, columns) of tokens after the projector, one entry for each run of the tower
Crops = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Work:
    """FLOPs of products with weights (`linear`), and of attention: scores and weighted values."""

    linear: float = 0
    attention: float = 0

    @property
    def total(self) -> float:
        return self.linear + self.attention

    def __add__(self, other: "Work") -> "Work":
        return Work(self.linear + other.linear, self.attention + other.attention)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one answer.

    `layers` has one entry per layer of the LLM, for the prefill. `head` computes the logits of the
    last position. `step` is the first decoding step with its head, `decode` is all steps. `pruner`
    is None if its cost is not counted.
    """

    tower: Work
    projector: Work
    pruner: float | None
    layers: tuple[Work, ...]
    head: float
    step: float
    decode: float

    @property
    def prefill(self) -> float:
        return sum(work.total for work in self.layers)

    @property
    def first_token(self) -> float:
        """Everything up to the first token; a pruner that is not counted adds nothing."""
        return (
            self.tower.total + self.projector.total + (self.pruner or 0) + self.prefill + self.head
        )

    @property
    def answer(self) -> float:
        """Everything."""
        return self.first_token + self.decode

    def record(self) -> dict[str, float | None]:
        """The phases and both sums, by name."""
        return {
            "tower": self.tower.total,
            "projector": self.projector.total,
            "pruner": self.pruner,
            "prefill": self.prefill,
            "head": self.head,
            "decode": self.decode,
            "first_token": self.first_token,
            "answer": self.answer,
        }


def count(
    config: PreTrainedConfig,
    *,
    layer_tokens: Sequence[int],
    text_tokens: int,
    crops: Crops,
    new_tokens: int = 1,
    pruner: Pruner | InLLMPruner | None = None,
    sections: Crops = (),
) -> Flops:
    """FLOPs of one prompt and its answer.

    Args:
        config: of a model of a supported family.
        layer_tokens: visual tokens that each layer of the LLM processes in the prefill.
        text_tokens: all other positions of the prompt, LLaVA-NeXT's newlines included.
        crops: one (24, 24) per image of LLaVA-1.5, several for LLaVA-NeXT and LLaVA-OneVision; one
            (16, 16) per tile of InternVL; for Qwen the grid of merged tokens of each image.
        new_tokens: length of the answer; the prefill gives its first token.
        pruner: the method, for its own cost; None: the unpruned model. For methods before the LLM
            the cost is computed as if each crop kept an equal share.
        sections: what a method before the LLM prunes as one, where that is not the crops: of
            LLaVA-OneVision the whole image and the mosaic of its tiles.

    Raises:
        ValueError: the family is not supported, or `layer_tokens` has another length than the LLM
            has layers.
    """
    text = config.get_text_config()
    if len(layer_tokens) != text.num_hidden_layers:
        raise ValueError(
            f"{len(layer_tokens)} counts in layer_tokens for {text.num_hidden_layers} layers"
        )

    def step(number: int) -> float:
        """The step that feeds new token `number`; each layer sees its prompt and the new tokens."""
        return sum(
            _layer(text, 1, tokens + text_tokens + number).total for tokens in layer_tokens
        ) + head(config)

    return Flops(
        tower=tower(config, crops, pruner, layer_tokens[0]),
        projector=projector(config, crops, pruner, layer_tokens[0]),
        pruner=_pruner(config, pruner, layer_tokens, text_tokens, sections or crops),
        layers=prefill(config, layer_tokens, text_tokens),
        head=head(config),
        step=step(1),
        decode=sum(step(number) for number in range(1, new_tokens)),
    )


def count_row(
    config: PreTrainedConfig, row: dict[str, Any], pruner: Pruner | InLLMPruner | None = None
) -> Flops:
    """FLOPs of one row of a sweep.

    Args:
        row: its columns `layer_tokens`, `prompt_tokens`, `new_tokens` and `crops`. LLaVA-1.5 needs
            no `crops`: `visual_tokens` gives the number of images. LLaVA-OneVision also needs
            `sections` for the cost of a method before the LLM.

    Raises:
        ValueError: another family has no `crops`.
    """
    crops = row.get("crops")
    if crops is None:
        crops = family_of(config.model_type).crops_of(config, row["visual_tokens"])
        if crops is None:
            raise ValueError(
                f"rows of {config.model_type} models need a column `crops`: (rows, columns) of "
                "every crop"
            )
    return count(
        config,
        layer_tokens=row["layer_tokens"],
        text_tokens=row["prompt_tokens"] - row["layer_tokens"][0],
        crops=crops,
        new_tokens=row["new_tokens"],
        pruner=pruner,
        sections=row.get("sections", ()),
    )


# --- phases


def tower(
    config: PreTrainedConfig,
    crops: Crops,
    pruner: Pruner | InLLMPruner | None = None,
    kept: int = 0,
) -> Work:
    """The image encoder: all blocks, since transformers also runs those after the feature layer.

    Args:
        pruner: a method that merges inside the encoder makes it cheaper, others do not matter.
        kept: tokens of all crops together that such a method leaves.

    Raises:
        ValueError: an image encoder that is not known.
    """
    family, total = family_of(config.model_type), Work()
    for rows, columns in crops:
        merged = _merged(family, config, pruner, rows * columns, _share(crops, kept))
        total += Work(*family.tower_flops(config, rows, columns, merged))
    return total


def projector(
    config: PreTrainedConfig,
    crops: Crops,
    pruner: Pruner | InLLMPruner | None = None,
    kept: int = 0,
) -> Work:
    """The projector, over all tokens that leave the image encoder; arguments as of `tower`."""
    family, tokens = family_of(config.model_type), 0
    for rows, columns in crops:
        size = rows * columns
        tokens += size - sum(_merged(family, config, pruner, size, _share(crops, kept)))
    return Work(tokens * family.projector_flops(config))


def _share(crops: Crops, kept: int) -> float:
    """The share of its tokens that every crop keeps, if all keep an equal one."""
    return min(1.0, kept / sum(rows * columns for rows, columns in crops)) if crops else 1.0


def _merged(
    family: Family,
    config: PreTrainedConfig,
    pruner: Pruner | InLLMPruner | None,
    size: int,
    share: float,
) -> list[int]:
    """Tokens of a crop of `size` that each block of the encoder merges away."""
    if not isinstance(pruner, TowerPruner):
        return []
    return pruner.merged_per_block(size, family.merging_blocks(config), round(share * size))


def prefill(
    config: PreTrainedConfig, layer_tokens: Sequence[int], text_tokens: float
) -> tuple[Work, ...]:
    """Every layer of the LLM over its visual tokens and the text."""
    text = config.get_text_config()
    return tuple(
        _layer(text, tokens + text_tokens, tokens + text_tokens) for tokens in layer_tokens
    )


def head(config: PreTrainedConfig) -> int:
    """The logits of one position."""
    text = config.get_text_config()
    return 2 * text.hidden_size * text.vocab_size


def _layer(text: Any, positions: float, seen: float) -> Work:
    """One decoder layer with `positions` new positions, each of which attends to `seen`.

    Its MLP is gated; keys and values may have fewer heads than queries.
    """
    d, queries, keys = _widths(text)
    weights = 2 * d * queries + 2 * d * keys + 3 * d * text.intermediate_size
    return Work(2 * positions * weights, 4 * positions * seen * queries)


def _widths(text: Any) -> tuple[int, int, int]:
    """Width of the hidden states, of all queries together, and of all keys together."""
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.hidden_size, text.num_attention_heads * size, text.num_key_value_heads * size


# --- the pruner


def _pruner(
    config: PreTrainedConfig,
    pruner: Pruner | InLLMPruner | None,
    layer_tokens: Sequence[int],
    text_tokens: int,
    crops: Crops,
) -> float | None:
    """The pruner's own count; every crop counts as if it kept an equal share."""
    text = config.get_text_config()
    if pruner is None:
        return 0
    if isinstance(pruner, InLLMPruner):
        return pruner.flops(PromptShape(tuple(layer_tokens), text_tokens, *_widths(text)))
    sizes, kept = [rows * columns for rows, columns in crops], layer_tokens[0]
    if kept >= sum(sizes):
        return 0
    family, vision, share = family_of(config.model_type), config.vision_config, kept / sum(sizes)
    encoder = (
        getattr(vision, family.VISION_WIDTHS[0]),
        family.merging_blocks(config),
        getattr(vision, family.VISION_FIELDS[1]),
    )
    costs = [
        pruner.flops(ImageShape(size, share * size, text.hidden_size, *encoder)) for size in sizes
    ]
    counted = [cost for cost in costs if cost is not None]
    return sum(counted) if len(counted) == len(costs) else None


# --- conventions of the literature


def conventions(
    config: PreTrainedConfig, layer_tokens: Sequence[int], text_tokens: float, crops: Crops
) -> dict[str, float]:
    """What papers print as "FLOPs", by the name of the convention. None of them counts the pruner.

    macs_visual: multiply-adds of the LLM's layers over the visual tokens alone (PyramidDrop,
        SparseVLM).
    macs_visual_fastv: the same by the formula of FastV and DivPrune, 4nd^2 + 2n^2d + 2ndm: two
        matrices in the MLP, as many keys as queries.
    flops_visual: twice macs_visual.
    macs_prompt, flops_prompt: the layers over the whole prompt.
    flops_prompt_causal: the same, with the pairs of positions that a causal mask allows (half).
    flops_first_token, flops_first_token_causal: tower, projector and the head at the last position
        included.
    flops_linear: products with weights alone: tower, projector, layers, and a head at every
        position. Profilers that count modules give this where attention runs in a fused kernel.
    """
    text = config.get_text_config()
    d, m = text.hidden_size, text.intermediate_size
    visual = sum(prefill(config, layer_tokens, 0), Work())
    prompt = sum(prefill(config, layer_tokens, text_tokens), Work())
    before = tower(config, crops) + projector(config, crops)
    causal = prompt.linear + prompt.attention / 2
    return {
        "macs_visual": visual.total / 2,
        "macs_visual_fastv": sum(
            4 * n * d * d + 2 * n * n * d + 2 * n * d * m for n in layer_tokens
        ),
        "flops_visual": visual.total,
        "macs_prompt": prompt.total / 2,
        "flops_prompt": prompt.total,
        "flops_prompt_causal": causal,
        "flops_first_token": before.total + prompt.total + head(config),
        "flops_first_token_causal": before.total + causal + head(config),
        "flops_linear": before.linear
        + prompt.linear
        + (layer_tokens[-1] + text_tokens) * head(config),
    }
