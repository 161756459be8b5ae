"""The benchmark: all settings of a model on the same prompts, in turn; batch 1, random weights."""

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedConfig

from secateur.budget import Budget
from secateur.cell import environment
from secateur.efficiency.flops import conventions, count
from secateur.efficiency.hardware import describe, snapshot
from secateur.efficiency.latency import (
    Timeline,
    ceiling_prompt,
    generate,
    marked_images,
    marked_prompt,
    phases,
)
from secateur.efficiency.memory import footprint
from secateur.geometry import random_model, random_processor
from secateur.injection import Sample, Trace, inject
from secateur.injection.session import Layout, adapter_for
from secateur.inputs import Inputs, Prompt
from secateur.pruners import InLLMPruner, Pruner, PrunerError
from secateur.records import MethodIdentity
from secateur.shapes.scenes import make_scene, render

RECIPE = (
    "scene i of secateur.shapes.scenes (seed of the bench, i); text ids drawn by numpy's "
    "default_rng([seed, i])"
)
Text = tuple[int, int]  # positions of text before the image and after it


@dataclass(frozen=True)
class Setting:
    """One thing to measure.

    `unpruned` and `ceiling` have no pruner: the model receives `tokens` visual tokens.
    """

    kind: Literal["unpruned", "ceiling", "pruned"]
    tokens: int
    pruner: Pruner | InLLMPruner | None = None

    @property
    def method(self) -> str:
        if self.pruner is None:
            return self.kind
        return MethodIdentity.of(self.pruner).label


@dataclass(frozen=True)
class Plan:
    """What a benchmark does: the same for all settings of a model."""

    device: torch.device
    dtype: str
    attn_implementation: str
    geometry: str  # its name in results: "true", or how the model was reduced
    prompts: int
    text: Text
    new_tokens: int
    warm_up: int
    timed: int
    seed: int

    def __post_init__(self) -> None:
        least = {"prompts": 1, "new_tokens": 1, "warm_up": 1, "timed": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)}: at least {low}")
        if len(self.text) != 2 or min(self.text) < 1:
            raise ValueError(
                f"text_tokens={self.text}: positions before the image and after it, at least 1 each"
            )
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype={self.dtype!r} is no dtype of torch, such as bfloat16")


class Bench:
    """One model and its prompts.

    Args:
        name: of the model in configs/model.
        config: its geometry.
        layout, image_side: as in secateur.inputs.

    Raises:
        ValueError: the attention kernel is not installed, or the model does not support it.
    """

    def __init__(
        self,
        name: str,
        config: PreTrainedConfig,
        plan: Plan,
        layout: Layout | None = None,
        image_side: int | None = None,
    ) -> None:
        self.name, self.plan, self.layout = name, plan, layout
        try:
            self.model: Any = random_model(
                config, plan.device, getattr(torch, plan.dtype), plan.attn_implementation, plan.seed
            )
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"attn_implementation={plan.attn_implementation} is not possible here: {error}. "
                "sdpa always is"
            ) from error
        self.config: Any = self.model.config
        inputs = self.inputs = Inputs(
            random_processor(self.config), self.config, layout=layout, image_side=image_side
        )
        self.adapter = adapter_for(self.model, layout)
        self.prompts = [_prompt(inputs, plan, number) for number in range(plan.prompts)]
        self.crops = inputs.family.crops(self.config, self.prompts[0][0])
        self.tokens = sum(rows * columns for rows, columns in self.crops)
        self.timeline = Timeline(plan.device)

    def settings(self, pruners: list[Pruner | InLLMPruner], budgets: list[Budget]) -> list[Setting]:
        """The unpruned model, and for each budget its ceiling and all methods.

        Raises:
            ValueError: a budget exceeds the tokens of the image.
        """
        planned = [Setting("unpruned", self.tokens)]
        for budget in budgets:
            keep = budget.resolve(self.tokens)
            planned += [
                Setting("ceiling", keep),
                *(Setting("pruned", keep, pruner) for pruner in pruners),
            ]
        return planned

    def run(
        self, settings: list[Setting], deadline: float, tick: Callable[[], None]
    ) -> tuple[pd.DataFrame, dict[str, str], dict[str, str]]:
        """Warm up and measure. Each round runs every setting once, in a random order.

        Args:
            deadline: by `time.monotonic`; no round begins after it.
            tick: called after each request.

        Returns:
            One row per timed request; the settings that were left out because no schedule has the
            budget as its mean, with the reason; and the settings that failed, with the reason (the
            traceback goes to stderr).
        """
        before = snapshot(self.plan.device)
        runnable, left_out, failed, rows = [], {}, {}, []
        for setting in settings:
            try:
                runnable.append((setting, self._facts(setting)))
            except PrunerError as error:
                left_out[f"{self.name} {setting.method} {setting.tokens}"] = str(error)
            except Exception as error:  # the other settings go on
                traceback.print_exc()
                failed[f"{self.name} {setting.method} {setting.tokens}"] = (
                    f"{type(error).__name__}: {error}"
                )
            tick()
        rng = np.random.default_rng(self.plan.seed)
        for number in range(self.plan.warm_up + self.plan.timed):
            if time.monotonic() > deadline:
                break
            for place, index in enumerate(rng.permutation(len(runnable))):
                setting, facts = runnable[index]
                with self._ready(setting, number) as (inputs, _):
                    generate(self.model, inputs, self.plan.new_tokens, self.timeline)
                times = phases(self.timeline.read())
                tick()
                if number >= self.plan.warm_up:
                    where = {
                        "round": number - self.plan.warm_up,
                        "place": place,
                        "prompt": number % self.plan.prompts,
                    }
                    rows.append(facts | where | times)
        return pd.DataFrame(rows).assign(**self._provenance(before)), left_out, failed

    @contextlib.contextmanager
    def _ready(self, setting: Setting, number: int) -> Iterator[tuple[BatchFeature, Trace | None]]:
        """Yields the inputs of a prompt, for the model in this setting and with marks."""
        inputs, sample = self.prompts[number % len(self.prompts)]
        core, pruner, trace = self.adapter.core, setting.pruner, None
        cuts: tuple[int, ...] = ()
        with contextlib.ExitStack() as stack:
            stack.enter_context(marked_images(core, self.timeline, "vision"))
            if pruner is None:
                inputs = stack.enter_context(ceiling_prompt(self.adapter, inputs, setting.tokens))
            else:
                trace = stack.enter_context(
                    inject(self.model, pruner, setting.tokens, layout=self.layout)
                )
                trace.announce([sample])
                if isinstance(pruner, InLLMPruner):
                    cuts = tuple(
                        pruner.schedule(self.tokens, len(self.adapter.layers), setting.tokens)
                    )
            stack.enter_context(marked_images(core, self.timeline, "images"))
            stack.enter_context(marked_prompt(self.adapter, self.timeline, cuts))
            yield inputs, trace

    def _facts(self, setting: Setting) -> dict[str, Any]:
        """Tokens, FLOPs and memory of a setting, from a request that is not timed."""
        with self._ready(setting, 0) as (inputs, trace):
            held = footprint(
                self.adapter,
                lambda: generate(self.model, inputs, self.plan.new_tokens, self.timeline),
            )
        layer_tokens = (setting.tokens,) * len(self.adapter.layers)
        text = inputs["input_ids"].shape[1] - setting.tokens
        if trace is not None:
            layer_tokens = trace.audits[0].layer_tokens
            text = trace.audits[0].prompt_tokens - layer_tokens[0]
        name = "none" if setting.pruner is None else setting.pruner.name
        flops = count(
            self.config,
            layer_tokens=layer_tokens,
            text_tokens=text,
            crops=self.crops,
            pruner=setting.pruner,
        )
        return {
            "kind": setting.kind,
            "method": setting.method,
            "pruner": name,
            "budget": setting.tokens,
            "tokens_in": layer_tokens[0],
            "tokens": sum(layer_tokens) / len(layer_tokens),
            "text_tokens": text,
            "macs_visual": conventions(self.config, layer_tokens, text, self.crops)["macs_visual"],
            "flops_first_token": flops.first_token,
            "kv_bytes": list(held.kv_bytes),
            "peak_bytes": held.peak_bytes,
            "peak_delta_bytes": held.peak_delta_bytes,
            "masked": held.masked,
        }

    def _provenance(self, before: dict[str, Any]) -> dict[str, Any]:
        plan = self.plan
        return {
            "model": self.name,
            "geometry": plan.geometry,
            "weights": "random",
            "device": describe(plan.device),
            "dtype": plan.dtype,
            "attn_implementation": plan.attn_implementation,
            "new_tokens": plan.new_tokens,
            "warm_up": plan.warm_up,
            "asked": plan.timed,
            "seed": plan.seed,
            "prompts": f"{plan.prompts} prompts: {RECIPE}",
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "",
            "transformers": version("transformers"),
            **{
                name: str(value)
                for name, value in environment(plan.device).as_json().items()
                if name != "device"
            },
            "state_before": str(before),
            "state_after": str(snapshot(plan.device)),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def _prompt(inputs: Inputs, plan: Plan, number: int) -> tuple[BatchFeature, Sample]:
    """A prompt on the device: an image between random text. All prompts have the same length."""
    config = inputs.config
    image = render(make_scene(plan.seed, number))
    if inputs.image_side:
        image = image.resize((inputs.image_side, inputs.image_side))
    made = inputs(Prompt(inputs.family.PLACEHOLDER, [image], ""))
    named = [
        config.text_config.bos_token_id,
        config.text_config.pad_token_id,
        config.image_token_id,
    ]
    rng = np.random.default_rng([plan.seed, number])
    before, after = (
        torch.tensor(rng.integers(3, min(i for i in named if i > 2), size=(1, size)))
        for size in plan.text
    )
    length = made["input_ids"].shape[1]

    def widened(name: str, value: Tensor) -> Tensor:
        if value.shape[1:] != (length,):
            return value
        if name == "input_ids":
            return torch.cat([before, value, after], 1)
        fill = int(name == "attention_mask")
        return torch.nn.functional.pad(value, plan.text, value=fill)

    whole = BatchFeature({name: widened(name, value) for name, value in made.items()})
    question = after[0].tolist()
    sample = Sample(str(number), tuple(question), " ".join(map(str, question)))
    return whole.to(plan.device, getattr(torch, plan.dtype)), sample
