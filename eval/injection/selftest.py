"""A test of injection on a tiny random model, for releases of transformers nobody has tested.

The references share nothing with injection: the language model gets the kept tokens directly,
without hooks and without a cache.
"""

import copy
import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from secateur.budget import Budget
from secateur.families import family_of
from secateur.families.contract import cure, tested
from secateur.geometry import random_model, random_processor, tiny
from secateur.injection.audit import PromptAudit, Trace
from secateur.injection.before_llm import BeforeLLM
from secateur.injection.encoder import Encoder
from secateur.injection.hooks import Hooks
from secateur.injection.in_llm import InLLM
from secateur.pruners import InLLMPruner, Pruner, build

LAYER = 2  # where the methods inside the language model cut, of 4 layers
STEPS = {
    "do_sample": False,
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "output_logits": True,
    "return_dict_in_generate": True,
}
SAME, CLOSE = 1e-5, 1e-4  # differences of float32 logits: same operations, other operations


class Differs(Exception):
    """What a pruned model computes is not what it should be."""


@functools.cache
def check(family: str, version: str) -> None:
    """Test injection into a model type on the installed release, once; warn where it passes.

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
            f"transformers {version} is not among the releases that injection is tested on "
            f"({tested()}), and its self-test on a tiny random {family} model failed: "
            f"{what.rstrip('.')}. Pruned answers could be silently wrong, so nothing is pruned: "
            f"{cure()}, or run `make test-matrix MATRIX={version}` and report what fails."
        ) from error
    _warn(version)


@functools.cache
def _warn(version: str) -> None:
    warnings.warn(
        f"transformers {version} is not among the releases that injection is tested on "
        f"({tested()}); it passed a self-test on a tiny random model",
        stacklevel=2,
    )


class _Case:
    """A prompt with one image for a tiny model, its unpruned answer, its embeddings."""

    def __init__(self, family: str, attention: str) -> None:
        self.family = family_of(family)
        config = tiny(self.family.SELFTEST)
        self.model: Any = random_model(
            config, dtype=torch.float32, attn_implementation=attention, std=0.2
        )
        self.adapter = self.family.adapter(self.model, None)
        size = (*self.family.SELFTEST_SIZE, 3)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8))
        text = f"USER: {self.family.PLACEHOLDER}\nWhat is this? ASSISTANT:"
        processor: Any = random_processor(config)
        self.inputs = processor(text=[text], images=[image], return_tensors="pt")
        visual = self.inputs["input_ids"][0] == self.adapter.image_token_id
        self.visual = visual.nonzero()[:, 0]  # [P]
        self.plain = self._generate()
        given: dict[str, Any] = {}
        handle = self.adapter.language_model.register_forward_pre_hook(
            lambda _module, _args, kwargs: given.update(kwargs), with_kwargs=True
        )
        fed = self.model(
            **self.inputs, output_hidden_states=True, output_attentions=attention == "eager"
        )
        handle.remove()
        # [P, D] for each of the first layers
        self.deepstack = self.adapter.without_deepstack(given)[1]
        self.embeds = fed.hidden_states[0]  # [1, L, D]
        self.attention = fed.attentions[LAYER - 1] if attention == "eager" else None  # [1, H, L, L]
        self.length = self.embeds.shape[1]
        length = self.length + int(STEPS["max_new_tokens"])
        self.positions = self.family.positions(self.inputs, self.visual, length)

    def check(self) -> None:
        """Raise Differs where a pruned answer is not what it should be."""
        before, inside = build("uniform"), build("fastv", layer=LAYER, budget="after")
        self._close(
            "the language model without hooks",
            self.plain,
            self._reference(self.plain, range(len(self.visual)), 0),
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
        pruned, audit = self._pruned(before, 0.5)
        places = self.family.places(audit.kept_indices[0], len(self.visual))
        want = self._reference(pruned, places, 0)
        self._close("a subset kept before the language model", pruned, want, CLOSE)
        pruned, audit = self._pruned(inside, 0.5)
        kept = audit.kept_indices[0]
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
                    f"by attention inside the language model {list(kept)} were kept; by the "
                    f"model's own attention they are {highest}"
                )
            self._check_saliency()

    def _check_saliency(self) -> None:
        """Compare the captured attention of the image encoder with its eager kernel's own."""
        core = self.model.model
        images = {name: self.inputs[name] for name in self.adapter.IMAGE_ARGUMENTS}
        want = self.family.encoder_saliency(self.model, images)  # [crops, H, N]
        if want is None:
            return
        encoder = Encoder(self.adapter, frozenset({"saliency"}), None, core.get_image_features)
        encoder(**images)
        found = torch.cat([image.captures["saliency"] for image in encoder.images])
        apart = float((found - want).abs().max())
        if not apart <= SAME:
            raise Differs(
                f"attention of the image encoder: {apart:.2g} apart from the encoder's own"
            )

    def _generate(self) -> Any:
        return self.model.generate(**self.inputs, **STEPS)

    def _pruned(self, pruner: Pruner | InLLMPruner, budget: float | str) -> tuple[Any, PromptAudit]:
        trace, parsed = Trace(), Budget.parse(budget)
        hooks: Hooks
        if isinstance(pruner, Pruner):
            compact = self.adapter.POSITIONS[0] == "compact"
            hooks = BeforeLLM(self.adapter, pruner, parsed, trace, None, compact, None)
        else:
            hooks = InLLM(self.adapter, pruner, parsed, trace, None)
        with hooks.attached():
            output = self._generate()
        if len(trace.audits) != 1:
            raise Differs(
                f"one prompt and its {STEPS['max_new_tokens']} steps counted as "
                f"{len(trace.audits)} prompts"
            )
        return output, trace.audits[0]

    def _reference(self, output: Any, kept: Sequence[int], layer: int) -> Tensor:
        """[T, V] logits of the tokens in `output`, by the language model without hooks.

        Its layers from `layer` on see only the places `kept` of the image.
        """
        new = output.sequences[0, self.length : -1]
        states = torch.cat([self.embeds, self.model.get_input_embeddings()(new)[None]], 1)
        stays = torch.ones(states.shape[1], dtype=torch.bool)
        stays[self.visual] = False
        stays[self.visual[list(kept)]] = True
        visual, positions = self.visual, self.positions[..., : states.shape[1]]
        model, deepstack = copy.deepcopy(self.adapter.language_model), self.deepstack
        layers, norm = model.layers, model.norm
        model.norm = nn.Identity()
        # where something happens between two layers
        stops = {0, layer, *range(len(deepstack) + 1), len(layers)}
        for start, end in itertools.pairwise(sorted(stops)):
            if start == layer:
                compact = self.adapter.POSITIONS[0] == "compact" and not layer
                positions = positions[..., : int(stays.sum())] if compact else positions[..., stays]
                states, deepstack = states[:, stays], [level[stays[visual]] for level in deepstack]
                visual = (stays.cumsum(0) - 1)[visual[stays[visual]]]
            model.layers = layers[start:end]
            states = _run(model, states, positions)
            if start < len(deepstack):
                states[:, visual] += deepstack[start]
        return self.model.lm_head(norm(states)[0, -len(new) - 1 :])

    def _close(self, what: str, output: Any, want: Tensor, tolerance: float) -> None:
        apart = float((torch.cat(output.logits) - want).abs().max())
        if not apart <= tolerance:  # NaN is not
            raise Differs(f"{what}: logits {apart:.2g} apart from what they should be")


def _run(language_model: Any, states: Tensor, positions: Tensor) -> Tensor:
    # without a mask, transformers takes gaps between positions for borders of sequences
    mask = torch.ones(states.shape[:2], dtype=torch.long)
    return language_model(
        inputs_embeds=states,
        position_ids=positions,
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
