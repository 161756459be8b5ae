"""A tiny random model with prompts, and references for it that share nothing with injection.

In a reference the language model's layers run one after another on the kept positions, without
hooks and without a cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from secateur.families import family_of
from secateur.geometry import random_model, random_processor, tiny
from secateur.injection import Sample, Trace, inject
from secateur.inputs import Inputs, Prompt
from secateur.pruners import InLLMPruner, Pruner

STEPS = {
    "do_sample": False,
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "output_logits": True,
    "return_dict_in_generate": True,
}
SIZES = [(224, 112), (112, 112), (140, 196)]  # width, height
QUESTIONS = ["what is this, and why?", "short", "a question of another length"]


@dataclass
class Row:
    """A prompt without padding as the unpruned language model receives it."""

    embeds: Tensor  # [L, D]
    positions: Tensor  # [1, L], with M-RoPE [3, 1, L]
    visual: Tensor  # [L] True at placeholders
    deep: list[Tensor]  # [placeholders, D] what the first layers add to them (DeepStack)


class Subject:
    """A tiny model with random weights, and prompts for it.

    Args:
        name: as in `secateur.geometry.tiny`.
        attention: kernel.
    """

    def __init__(self, name: str, attention: str) -> None:
        config = tiny(name)
        self.family = family_of(config.model_type)
        self.model: Any = random_model(config, attn_implementation=attention, std=0.2)
        self.adapter = self.family.adapter(self.model, None)
        self.inputs = Inputs(random_processor(config), config)
        self.policies = self.adapter.POSITIONS

    def batch(self, prompts: list[list[int]], first: int = 0) -> Any:
        """Tensors of prompts with these images; `first` numbers their questions."""
        rows = []
        for number, images in enumerate(prompts, first):
            places = (self.family.PLACEHOLDER + ", ") * len(images)
            text = f"USER: {places}{QUESTIONS[number]} ASSISTANT:"
            rows.append(self.inputs(Prompt(text, [scene(one) for one in images], "")))
        return self.inputs.collate(rows)

    def generate(self, batch: Any, **more: Any) -> Any:
        """A greedy generation with its logits."""
        return self.model.generate(**{**batch, **more}, **STEPS)

    @contextmanager
    def pruned(
        self, pruner: Pruner | InLLMPruner, budget: str, names: str = "", **options: Any
    ) -> Iterator[Trace]:
        """An injection block; `names` are the samples of its first call, else their numbers."""
        with inject(self.model, pruner, budget, **options) as trace:
            if names:
                trace.announce([Sample(name) for name in names])
            yield trace

    def received(self, call: Callable[..., Any], **options: Any) -> tuple[Any, dict[str, Any]]:
        """What a call returns, and what the language model receives first in it."""
        seen: list[dict[str, Any]] = []
        handle = self.model.model.language_model.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
        )
        output = call(**options)
        handle.remove()
        return output, seen[0]

    def rows(self, batch: Any) -> list[Row]:
        """The prompts of a batch."""
        _, given = self.received(self.model, **batch)
        rows, visual = [], batch["input_ids"] == self.adapter.image_token_id
        levels, before = self.adapter.without_deepstack(given)[1], 0
        for number, real in enumerate(batch["attention_mask"].bool()):
            length, mine = int(real.sum()), int(visual[number].sum())
            positions = given.get("position_ids")
            positions = (
                torch.arange(length)[None]
                if positions is None or positions.dim() == 2
                else positions[-3:, number, real][:, None]
            )
            deep = [level[before : before + mine] for level in levels]
            before += mine
            rows.append(
                Row(given["inputs_embeds"][number, real], positions, visual[number, real], deep)
            )
        return rows

    def reference(
        self, row: Row, stays: Tensor, new: Tensor, layer: int = 0, compact: bool = False
    ) -> Tensor:
        """[new, V] logits where the layers from `layer` on see the positions `stays` alone.

        Args:
            stays: [L] True at kept positions.
            new: [new] the generated tokens.
            compact: number the kept positions anew.
        """
        steps = len(new) - 1
        hidden = torch.cat([row.embeds, self.model.get_input_embeddings()(new[:-1])])[None]
        following = int(row.positions.max()) + 1 + torch.arange(steps)
        positions = torch.cat(
            [row.positions, following.expand(*row.positions.shape[:-1], steps)], -1
        )
        stays = torch.cat([stays, torch.ones(steps, dtype=torch.bool)])
        visual = torch.cat([row.visual, torch.zeros(steps, dtype=torch.bool)])
        deep, language = row.deep, self.model.model.language_model
        for number, block in enumerate(language.layers):
            if number == layer:
                hidden, positions = hidden[:, stays], positions[..., stays]
                deep = [level[stays[visual]] for level in deep]
                visual = visual[stays]
                if compact:
                    positions = torch.arange(hidden.shape[1])[None]
            mask = torch.full((hidden.shape[1],) * 2, torch.finfo(hidden.dtype).min).triu(1)
            output = block(
                hidden,
                attention_mask=mask[None, None],
                position_embeddings=language.rotary_emb(hidden, positions),
            )
            hidden = output[0] if isinstance(output, tuple) else output
            if number < len(deep):
                hidden[0, visual] += deep[number]
        return self.model.lm_head(language.norm(hidden))[0, -steps - 1 :]


def scene(number: int) -> Image.Image:
    """An image of noise."""
    width, height = SIZES[number]
    noise = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)
