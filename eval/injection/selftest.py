"""A test of injection on a tiny random model, for releases of transformers that nobody has tested.

The references share nothing with injection: the language model is fed the kept tokens by hand, without hooks and
without a cache.
"""

import copy
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from secateur.budget import Budget
from secateur.geometry import random_model, random_processor, tiny
from secateur.injection.audit import SampleRecord
from secateur.injection.calls import Calls, Trace
from secateur.injection.contract import cure, tested
from secateur.injection.encoder import Encoder
from secateur.injection.entrance import Entrance
from secateur.injection.families import adapter_of
from secateur.injection.layers import Layers
from secateur.pruners import InLLMPruner, Pruner, build

LAYER = 2  # where the methods inside the language model cut, of 4 layers
SIDE = 4  # a crop of the tiny LLaVA models has 4 x 4 tokens
STEPS = {
    "do_sample": False,
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "output_logits": True,
    "return_dict_in_generate": True,
}
SAME, CLOSE = 1e-5, 1e-4  # differences of logits in float32, by the same operations and by others


class Differs(Exception):
    """What a pruned model computes is not what it should be."""


@functools.cache
def check(family: str, version: str) -> None:
    """Test injection into a model type on the installed release; once per process, and a warning where it passes.

    Raises:
        ValueError: it does not work on this release.
    """
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            for attention in ("sdpa", "eager"):
                _Case(family, attention).check()
    except Exception as error:  # whatever a release breaks
        what = str(error) if isinstance(error, Differs) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"transformers {version} is not among the releases that injection is tested on ({tested()}), and its self-test on a "
            f"tiny random {family} model failed: {what.rstrip('.')}. Pruned answers could be silently wrong, so nothing is "
            f"pruned: {cure()}, or run `make test-matrix MATRIX={version}` and report what fails."
        ) from error
    _warn(version)


@functools.cache
def _warn(version: str) -> None:
    warnings.warn(
        f"transformers {version} is not among the releases that injection is tested on ({tested()}); it passed a self-test on a "
        "tiny random model",
        stacklevel=2,
    )


class _Case:
    """A prompt with one image for a tiny model: what the unpruned model says, and what its language model is fed."""

    def __init__(self, family: str, attention: str) -> None:
        self.family, qwen = family, family == "qwen2_5_vl"
        config = tiny("llava_next_fixed" if family == "llava_next" else family)
        self.model: Any = random_model(
            config, dtype=torch.float32, attn_implementation=attention, std=0.2
        )
        self.adapter = adapter_of(self.model)
        size = (
            (112, 168) if qwen else (112, 112)
        )  # 4 x 6 tokens; LLaVA-NeXT: 2 x 2 tiles, without padding
        image = Image.fromarray(
            np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
        )
        placeholder = "<|vision_start|><|image_pad|><|vision_end|>" if qwen else "<image>"
        text = f"USER: {placeholder}\nWhat is this? ASSISTANT:"
        processor: Any = random_processor(config)
        self.inputs = processor(text=[text], images=[image], return_tensors="pt")
        self.visual = (self.inputs["input_ids"][0] == self.adapter.image_token_id).nonzero()[
            :, 0
        ]  # [P]
        self.plain = self._generate()
        fed = self.model(
            **self.inputs, output_hidden_states=True, output_attentions=attention == "eager"
        )
        self.embeds = fed.hidden_states[0]  # [1, L, D]
        self.attention = fed.attentions[LAYER - 1] if attention == "eager" else None  # [1, H, L, L]
        self.length = self.embeds.shape[1]
        self.positions = self._positions(self.length + STEPS["max_new_tokens"])

    def check(self) -> None:
        """Raise Differs where a pruned answer is not what it should be."""
        places = range(len(self.visual))
        before, inside = build("uniform"), build("fastv", layer=LAYER, budget="after")
        self._close(
            "the language model fed by hand",
            self.plain,
            self._reference(self.plain, places, 0),
            CLOSE,
        )
        for what, pruner in (("before", build("none")), ("inside", inside)):
            kept_all, _ = self._pruned(pruner, "full")
            self._close(
                f"all tokens kept {what} the language model",
                kept_all,
                torch.cat(self.plain.logits),
                SAME,
            )
        pruned, record = self._pruned(before, 0.5)
        want = self._reference(pruned, self._places(record.kept_indices[0]), 0)
        self._close("a subset kept before the language model", pruned, want, CLOSE)
        pruned, record = self._pruned(inside, 0.5)
        kept = record.kept_indices[0]
        self._close(
            "a subset kept inside the language model",
            pruned,
            self._reference(pruned, kept, LAYER),
            CLOSE,
        )
        if self.attention is not None:
            received = self.attention[0, :, -1, self.visual].mean(0)
            highest = received.topk(len(kept)).indices.sort().values.tolist()
            if highest != list(kept):
                raise Differs(
                    f"by attention inside the language model {list(kept)} were kept; the model's own says {highest}"
                )
            self._check_saliency()

    def _check_saliency(self) -> None:
        """The attention of the image encoder, which Qwen's does not give out, as its own eager kernel has it."""
        if self.family == "qwen2_5_vl":
            return
        core, images = (
            self.model.model,
            {name: self.inputs[name] for name in self.adapter.IMAGE_ARGUMENTS},
        )
        encoder = Encoder(self.adapter, frozenset({"saliency"}), None, core.get_image_features)
        encoder(**images)
        pixels = images["pixel_values"].flatten(0, -4)
        attentions = core.vision_tower(pixels, output_attentions=True).attentions
        want = attentions[self.model.config.vision_feature_layer][:, :, 0, 1:]  # [crops, H, N]
        apart = float((encoder.images[0].captures["saliency"] - want).abs().max())
        if not apart <= SAME:
            raise Differs(
                f"attention of the image encoder: {apart:.2g} apart from the encoder's own"
            )

    def _generate(self) -> Any:
        return self.model.generate(**self.inputs, **STEPS)

    def _pruned(
        self, pruner: Pruner | InLLMPruner, budget: float | str
    ) -> tuple[Any, SampleRecord]:
        trace, parsed = Trace(), Budget.parse(budget)
        calls: Calls
        if isinstance(pruner, Pruner):
            calls = Entrance(
                self.adapter, pruner, parsed, trace, None, compact=self._compact, clip=None
            )
        else:
            calls = Layers(self.adapter, pruner, parsed, trace, None)
        with calls.attached():
            output = self._generate()
        if len(trace.records) != 1:
            raise Differs(
                f"one prompt and its {STEPS['max_new_tokens']} steps counted as {len(trace.records)} prompts"
            )
        return output, trace.records[0]

    def _reference(self, output: Any, kept: Sequence[int], layer: int) -> Tensor:
        """[T, V] logits of the tokens of `output` by a model whose layers from `layer` on see the places `kept` of the image."""
        new = output.sequences[0, self.length : -1]
        states = torch.cat([self.embeds, self.model.get_input_embeddings()(new)[None]], 1)
        stays = torch.ones(states.shape[1], dtype=torch.bool)
        stays[self.visual] = False
        stays[self.visual[list(kept)]] = True
        model, positions = self.adapter.language_model, self.positions[..., : states.shape[1]]
        if layer:
            states = _run(model, states, positions).hidden_states[layer]
            model = copy.deepcopy(model)
            model.layers = model.layers[layer:]
        count = int(stays.sum())
        positions = positions[..., :count] if self._compact and not layer else positions[..., stays]
        hidden = _run(model, states[:, stays], positions).last_hidden_state
        return self.model.lm_head(hidden[0, -len(new) - 1 :])

    def _close(self, what: str, output: Any, want: Tensor, tolerance: float) -> None:
        apart = float((torch.cat(output.logits) - want).abs().max())
        if not apart <= tolerance:  # NaN is not
            raise Differs(f"{what}: logits {apart:.2g} apart from what they should be")

    @property
    def _compact(self) -> bool:
        return self.adapter.POSITIONS[0] == "compact"

    def _places(self, numbers: Sequence[int]) -> list[int]:
        """The places of the image that hold the tokens `numbers`, and the newlines of their rows."""
        if self.family != "llava_next":
            return list(numbers)
        per_crop, side = SIDE**2, 2 * SIDE
        mosaic = [
            [
                (1 + row // SIDE * 2 + column // SIDE) * per_crop
                + row % SIDE * SIDE
                + column % SIDE
                for column in range(side)
            ]
            for row in range(side)
        ]
        held = [
            [number] for number in range(per_crop)
        ]  # of each place, the tokens that it stays for
        for line in mosaic:
            held += [*([number] for number in line), line]
        return [place for place, tokens in enumerate(held) if set(tokens) & set(numbers)]

    def _positions(self, length: int) -> Tensor:
        """[1, length] positions of the unpruned prompt and what follows; [3, 1, length] with M-RoPE."""
        if self.family != "qwen2_5_vl":
            return torch.arange(length)[None]
        _, rows, columns = (self.inputs["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
        start, end = int(self.visual[0]), int(self.visual[-1]) + 1
        place = torch.arange(rows * columns)
        image = start + torch.stack([torch.zeros_like(place), place // columns, place % columns])
        after = start + max(rows, columns) + torch.arange(length - end)
        return torch.cat([torch.arange(start).expand(3, -1), image, after.expand(3, -1)], 1)[
            :, None
        ]


def _run(language_model: Any, states: Tensor, positions: Tensor) -> Any:
    mask = torch.ones(
        states.shape[:2], dtype=torch.long
    )  # without one, gaps between positions read as borders of sequences
    return language_model(
        inputs_embeds=states,
        position_ids=positions,
        attention_mask=mask,
        use_cache=False,
        output_hidden_states=True,
    )
