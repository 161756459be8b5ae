"""InternVL on tiny real models: tiles, the whole image after them, 2 x 2 patches per token."""

from dataclasses import dataclass, field

import pytest
import torch
from conftest import picture
from test_inject import STEPS, logits
from transformers import LlamaConfig

from secateur.efficiency.flops import tower
from secateur.geometry import random_model, random_processor, tiny
from secateur.injection import inject
from secateur.injection.session import adapter_for
from secateur.invariants import all_kept_inside, subset_inside
from secateur.pruners import Pruner, Selection, VisualTokens, build
from secateur.subject import Subject

N = 16  # tokens of a tile
SIZES = [(240, 120), (100, 100)]  # two tiles and the whole image; one tile
TEXT = "<|im_start|>user\n<IMG_CONTEXT>\nwhat is this?<|im_end|>\n<|im_start|>assistant\n"


def made(attention: str, qk_norm: bool = False):
    config = tiny("internvl")
    config.vision_config.use_qk_norm = qk_norm
    return random_model(config, attn_implementation=attention, std=0.2)


@pytest.fixture(scope="module")
def own(attention):
    return made(attention)


@pytest.fixture(scope="module")
def processor():
    return random_processor(tiny("internvl"))


def encode(processor, *sizes, text=TEXT):
    images = [picture(number).resize(size) for number, size in enumerate(sizes)]
    text = text.replace("<IMG_CONTEXT>\n", "<IMG_CONTEXT>\n" * len(sizes))
    return processor(text=[text], images=images, return_tensors="pt")


@dataclass(frozen=True)
class Looks(Pruner):
    """Keeps given tokens of every crop, in this order, and what it was shown."""

    picks: tuple[int, ...] = (3, 5, 10)
    seen: list[VisualTokens] = field(default_factory=list)

    name = "looks"
    paper = "-"
    status = "baseline"
    needs = frozenset(
        {
            *("features", "encoder_features", "saliency", "first_saliency", "object_attention"),
            *("output_attention", "encoder_keys", "grid"),
        }
    )

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        self.seen.append(tokens)
        indices = torch.tensor(self.picks[:keep]).expand(len(tokens.features), -1)
        return Selection(indices, custom_order=True)


def entering(model, call):
    """The embeddings that the language model receives first in a call."""
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    call()
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_the_whole_image_is_the_first_crop_and_the_last_in_the_prompt(own, processor):
    inputs, pruner = encode(processor, *SIZES), Looks((9, 2, 5))
    tiles = own.model.get_image_features(inputs["pixel_values"]).pooler_output
    assert len(tiles) == 3 + 1
    with inject(own, pruner, "3/tile") as trace:
        embeds = entering(own, lambda: own.generate(**inputs, **STEPS))
    (tokens,) = pruner.seen
    assert tokens.image_of_row == (0, 0, 0, 1)
    assert torch.equal(tokens.features, tiles[[2, 0, 1, 3]])
    assert tokens.grid == (4, 4)
    (audit,) = trace.audits
    assert audit.visual_tokens == (3 * N, N)
    # tile by tile as in the prompt, each in the order of its selection
    one, two, whole = ([N * crop + pick for pick in (9, 2, 5)] for crop in (1, 2, 0))
    assert audit.kept_indices == ((*one, *two, *whole), (9, 2, 5))
    kept = tiles[:, [9, 2, 5]].flatten(0, 1)
    first = int((inputs["input_ids"][0] == own.config.image_token_id).nonzero()[0])
    assert torch.equal(embeds[0, first : first + 9], kept[:9])
    assert torch.equal(embeds[0, first + 9 + 3 : first + 9 + 3 + 3], kept[9:])


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_captures_are_those_of_an_eager_tower(processor, qk_norm):
    model, inputs, pruner = made("eager", qk_norm), encode(processor, SIZES[0]), Looks()
    keys = []
    handle = model.model.vision_tower.encoder.layer[-1].attention.k_norm.register_forward_hook(
        lambda _module, _args, output: keys.append(output[:, 1:])
    )
    eager = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    handle.remove()
    with inject(model, pruner, 9):
        model.generate(**inputs, max_new_tokens=1)
    (tokens,), order = pruner.seen, [2, 0, 1]

    def blocks(patches):  # [tiles, 64, ...] -> [tiles, 16, ...] means of 2 x 2, by indexing
        index = [
            [8 * (2 * row + down) + 2 * column + right for down in (0, 1) for right in (0, 1)]
            for row in range(4)
            for column in range(4)
        ]
        return patches[:, torch.tensor(index)].mean(2)[order]

    last, first, middle = (eager.attentions[block] for block in (3, 0, 1))
    for name, want in {
        "saliency": blocks(last[:, :, 0, 1:].transpose(1, 2)).transpose(1, 2),
        "first_saliency": blocks(first[:, :, 0, 1:].transpose(1, 2)).transpose(1, 2),
        "object_attention": blocks(middle.mean((1, 2))[:, 1:]),
        "output_attention": blocks(last.mean((1, 2))[:, 1:]),
        "encoder_keys": blocks(keys[0]),
    }.items():
        assert (getattr(tokens, name) - want).abs().max() < 1e-5, name
    projected = model.model.multi_modal_projector(tokens.encoder_features)
    assert torch.allclose(projected, tokens.features, atol=1e-5)


def test_hired_gives_the_whole_image_its_share(own, processor):
    with inject(own, build("hired", alpha=0.5), 24) as trace:
        own.generate(**encode(processor, SIZES[0]), max_new_tokens=1)
    numbers = torch.tensor(trace.audits[0].kept_indices[0])
    assert torch.bincount(numbers // N).tolist()[0] == 12


def test_one_budget_for_all_tiles_of_an_image(own, processor):
    for budget, each in ((12, [4, 4, 4]), (13, [5, 4, 4]), ("2/tile", [2, 2, 2])):
        with inject(own, build("random"), budget) as trace:
            own.generate(**encode(processor, SIZES[0]), max_new_tokens=1)
        numbers = torch.tensor(trace.audits[0].kept_indices[0])
        assert torch.bincount(numbers // N).tolist() == each
    with pytest.raises(ValueError, match="an image has 3 crops"), inject(own, build("random"), 2):
        own.generate(**encode(processor, SIZES[0]), max_new_tokens=1)


def test_placeholders_that_no_tiles_fit_are_refused(own, processor):
    inputs = encode(processor, SIZES[0])
    inputs["input_ids"][0, -1] = own.config.image_token_id
    inputs["input_ids"][0, (inputs["input_ids"][0] == own.config.image_token_id).nonzero()[0]] = 20
    message = "runs of 47, 1 image placeholders for 3 tiles of 16 tokens"
    with inject(own, build("random"), "50%"), pytest.raises(ValueError, match=message):
        own.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": -2}, r"layer\(s\) -2 with strategy 'default'; .* layer -1"),
        ({"vision_feature_select_strategy": "full"}, "layer -1 with strategy 'default'"),
    ],
)
def test_options_that_are_not_supported_are_named(change, message):
    config = tiny("internvl")
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        adapter_for(random_model(config, "meta"))


def test_another_language_model_is_named():
    config = tiny("internvl")
    config.text_config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    message = "a language model of type 'llama' are not supported; supported: qwen2, qwen3"
    with pytest.raises(ValueError, match=message):
        adapter_for(random_model(config, "meta"))
    with pytest.raises(ValueError, match=message):
        tower(config, [(4, 4)])


@torch.no_grad()
def test_visionzips_contextual_tokens_end_every_tile(own, processor):
    inputs = encode(processor, SIZES[0])
    with inject(own, build("visionzip", contextual=2, keep_cls=False), "6/tile") as trace:
        pruned = own.generate(**inputs, **STEPS)
    numbers = trace.audits[0].kept_indices[0]
    assert [number // N for number in numbers] == [1] * 6 + [2] * 6 + [0] * 6
    assert torch.isfinite(logits(pruned)).all()


@torch.no_grad()
def test_norms_of_queries_and_keys_in_a_qwen3_are_read(attention):
    subject = Subject("internvl_qwen3", attention)
    assert all_kept_inside(subject) == 0
    assert subset_inside(subject) < 1e-4  # on the eager kernel it compares what FastV ranks by
