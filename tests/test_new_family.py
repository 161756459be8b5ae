"""A new family stands in one place: a toy family works in geometry, inputs, FLOPs and injection."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import picture
from lmms_eval.protocol import ChatMessages
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from secateur import build, cell, families, inject, source
from secateur.budget import Budget
from secateur.efficiency.flops import count, count_row, projector, tower
from secateur.families.llava import TINY_CLIP, TINY_VICUNA, Llava, llava_config
from secateur.geometry import config_of, random_model, random_processor, reduced, tiny
from secateur.inputs import Inputs
from secateur.models import PrunedModel
from secateur.paths import SHAPES_MODEL
from secateur.pruners import plugins
from secateur.shapes.datasets import build as build_shapes
from secateur.tasks import TASKS
from secateur.tasks.load import load_tasks

from_pretrained = LlavaForConditionalGeneration.from_pretrained
ROOT = Path(__file__).resolve().parents[1]


class ToyConfig(LlavaConfig):
    model_type = "toy_vl"


class ToyForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = ToyConfig


class Toy(Llava):
    MODEL_TYPE = "toy_vl"
    NEW_TOKENS = 7
    GEOMETRIES = ("pad",)
    CONFIGS = {"toy_7b": lambda: llava_config(ToyConfig, TINY_CLIP, TINY_VICUNA)}  # noqa: RUF012
    TINY = {"toy_vl": lambda: llava_config(ToyConfig, TINY_CLIP, TINY_VICUNA)}  # noqa: RUF012

    def projector_flops(self, config):
        return 1


FAMILY = Toy()


@pytest.fixture
def toy(monkeypatch):
    """The tiny config of the toy family, which is registered for one test."""
    monkeypatch.setitem(families.MODULES, "toy_vl", __name__)
    AutoConfig.register("toy_vl", ToyConfig, exist_ok=True)
    AutoModelForImageTextToText.register(ToyConfig, ToyForConditionalGeneration, exist_ok=True)
    return tiny("toy_vl")


def inputs_of(config):
    return Inputs(random_processor(config), config, geometry="pad")


def prompt(inputs):
    part = [{"type": "image", "url": picture(0).resize((60, 40))}, {"type": "text", "text": "Why?"}]
    chat = ChatMessages(messages=[{"role": "user", "content": part}])
    return inputs.prompt(chat)


def test_geometry_knows_it(toy):
    assert toy.model_type == config_of("toy_7b").model_type == "toy_vl"
    small = reduced(toy, layers=2, shrink=2)
    assert small.vision_config.num_hidden_layers == 2
    assert type(random_model(toy, "meta")) is ToyForConditionalGeneration


def test_inputs_take_its_fields(toy):
    made = prompt(inputs_of(toy))
    assert made.images[0].size == (60, 60)
    assert made.text == "USER: <image>\nWhy? ASSISTANT:"
    with pytest.raises(ValueError, match="geometry='processor' is not one of pad, which models of"):
        Inputs(random_processor(toy), toy)


def test_flops_ask_it(toy):
    llava = tiny("llava")
    grid = [(4, 4)]
    assert tower(toy, grid) == tower(llava, grid)
    assert projector(toy, grid).total == 16
    row = {"visual_tokens": 16, "layer_tokens": [8] * 4, "prompt_tokens": 20, "new_tokens": 1}
    want = count(toy, layer_tokens=[8] * 4, text_tokens=12, crops=grid)
    assert count_row(toy, row) == want


@pytest.mark.parametrize("method", [{"name": "uniform"}, {"name": "fastv", "layer": 1}])
def test_injection_prunes_it(toy, method):
    model = random_model(toy, std=0.2)
    inputs = inputs_of(toy)
    tensors = inputs(prompt(inputs))
    options = {"max_new_tokens": 3, "do_sample": False}
    unpruned = model.generate(**tensors, **options)
    pruner = build(**method)
    with inject(model, pruner, "full"):
        assert torch.equal(model.generate(**tensors, **options), unpruned)
    with inject(model, pruner, 8) as trace:
        model.generate(**tensors, **options)
    assert trace.audits[0].visual_tokens == (16,)
    assert trace.audits[0].kept_indices != (tuple(range(16)),)
    assert torch.equal(model.generate(**tensors, **options), unpruned)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The family of CONTRIBUTING's plug-in, which is known for one test."""
    monkeypatch.setattr(families, "_OUTSIDE", {})
    monkeypatch.setattr(source, "_OUTSIDE", {})
    text = (ROOT / "CONTRIBUTING.md").read_text()
    path = tmp_path / "my_family.py"
    path.write_text(re.search(r"```python\n(# my_family\.py\n.*?)```", text, re.DOTALL)[1])
    yield path
    plugins._loaded.clear()
    CONFIG_MAPPING._extra_content.pop("my_vl", None)


def test_a_plug_in_adds_a_family(outside, tmp_path):
    """The recipe of CONTRIBUTING: the embedded checkpoint under another model type."""
    before = source.code("my_vl"), source.code("llava")
    assert plugins.load_plugins([outside]) == []
    assert source.code("my_vl") != before[0]
    assert source.code("llava") == before[1]
    checkpoint, original = tmp_path / "checkpoint", from_pretrained(SHAPES_MODEL)
    shutil.copytree(SHAPES_MODEL, checkpoint, ignore=lambda *_: ["model.safetensors"])
    fields = {k: v for k, v in original.config.to_dict().items() if k != "model_type"}
    config = AutoConfig.for_model("my_vl", **fields)
    mine = AutoModelForImageTextToText.from_config(config, dtype=original.dtype)
    mine.load_state_dict(original.state_dict())
    mine.save_pretrained(checkpoint)
    fields = {"dtype": "float32", "device": "cpu", "batch_tokens": 1000}
    task = load_tasks(["pope"], build_shapes(tmp_path / "shapes", {"pope": 6}))["pope"]
    answers = []
    for folder, family in ((SHAPES_MODEL, "llava"), (checkpoint, "my_vl")):
        model = PrunedModel(str(folder), family=family, **fields)
        model.use(build("scope"), Budget(tokens=16), None)
        found, rows = cell.run(model, task, TASKS["pope"], 6, 0)
        answers.append((rows["answer"].tolist(), rows["kept_indices"].tolist(), found.flops))
    assert answers[0] == answers[1]
    with pytest.raises(ValueError, match="'my_vl' is known already"):
        families.register_family(families.family_of("my_vl"))


def test_without_its_line_it_is_refused(toy, monkeypatch):
    model = random_model(toy)
    monkeypatch.delitem(families.MODULES, "toy_vl")
    with (
        pytest.raises(ValueError, match=r"'toy_vl' is not supported; supported: llava, llava_next"),
        inject(model, build("uniform"), 8),
    ):
        pass
