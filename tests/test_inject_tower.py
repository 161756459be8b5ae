"""Merging inside the image encoder: the hooks against a literal reading, and what is refused."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from conftest import picture, tiny_model

from secateur.cache import EncodeCache
from secateur.families.contract import ContractError
from secateur.geometry import random_processor, tiny
from secateur.injection import inject
from secateur.injection.encoder import ImageCache
from secateur.pruners import PrunerError, VisualTokens, build

sys.path.append(str(Path(__file__).parent / "reference"))
from literal_tower import encode, soft_matching

STEPS = {
    "do_sample": False,
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "output_logits": True,
    "return_dict_in_generate": True,
}
PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"
N = 16


@pytest.fixture(scope="module")
def inputs():
    return random_processor(tiny("llava"))(
        text=[PROMPT, PROMPT], images=[picture(0), picture(1)], return_tensors="pt"
    )


def module_state(model):
    return [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]


def embeddings(model, inputs, literal):
    """The prompt's embeddings with the literal tokens in the place of the image's."""
    ids = inputs["input_ids"][0]
    text = model.get_input_embeddings()(ids)
    visual = (ids == model.config.image_token_id).nonzero()[:, 0]
    states = torch.stack([token.state for token in literal[1:]])
    image = model.model.multi_modal_projector(states)
    return torch.cat([text[: visual[0]], image, text[visual[-1] + 1 :]])[None]


OPTIONS = [
    {},
    {"schedule": "decreasing"},
    {"proportional_attention": False},
    {"order": "raster"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("keep", [12, 8, 4])
@torch.no_grad()
def test_the_hooks_equal_a_literal_reading(model, inputs, options, keep):
    """Tokens, their order, and the logits of the language model on them."""
    one = {name: value[:1] for name, value in inputs.items()}
    pruner = build("tome", **options)
    vision = model.model.vision_tower
    seen = {}
    blocks = [block for block in vision.modules() if type(block).__name__ == "CLIPEncoderLayer"]
    handle = blocks[0].register_forward_pre_hook(lambda _, args: seen.update(x=args[0][0].clone()))
    model(**one)
    handle.remove()
    before = module_state(model)
    with inject(model, pruner, keep) as trace:
        output = model(**one, logits_to_keep=1)
    assert module_state(model) == before

    plan = pruner.merged_per_block(N, 3, keep)
    literal = encode(blocks[:3], seen["x"], plan, pruner.proportional_attention)
    assert sorted(patch for token in literal for patch in token.patches) == list(range(N))
    if pruner.raster:
        literal = sorted(literal, key=lambda token: token.place)
    (indices,) = trace.audits[0].kept_indices
    assert list(indices) == [token.place for token in literal[1:]]
    want = model(inputs_embeds=embeddings(model, one, literal)).logits[:, -1:]
    assert (output.logits - want).abs().max() < 1e-4


def test_a_full_budget_changes_nothing(model, inputs):
    plain = model.generate(**inputs, **STEPS)
    with inject(model, build("tome"), "full") as trace:
        kept = model.generate(**inputs, **STEPS)
    assert torch.equal(torch.cat(kept.logits), torch.cat(plain.logits))
    assert [audit.kept_tokens for audit in trace.audits] == [(N,), (N,)]


def test_a_batch_equals_its_rows(model, inputs):
    with inject(model, build("tome"), 5) as trace:
        together = model.generate(**inputs, **STEPS)
    assert [audit.kept_tokens for audit in trace.audits] == [(5,), (5,)]
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        with inject(model, build("tome"), 5) as single:
            one = model.generate(**alone, **STEPS)
        assert single.audits[0].kept_indices == trace.audits[row].kept_indices
        assert (torch.cat(one.logits) - torch.cat(together.logits)[row::2]).abs().max() < 1e-4


def test_images_of_a_cache_are_left_alone(model, inputs):
    """An image's features depend on the budget: the cache of other methods must not hold them."""
    answers = {}
    images = ImageCache(EncodeCache(10**8), "model")
    for cache in (None, images):
        for name, keep in (("fastervlm", 5), ("tome", 5), ("tome", 8), ("fastervlm", 5)):
            with inject(model, build(name), keep, cache=cache):
                output = torch.cat(model.generate(**inputs, **STEPS).logits)
            assert (output - answers.setdefault((name, keep), output)).abs().max() < 1e-4


@pytest.mark.parametrize("layout", ["anyres", "fixed2880"])
def test_every_crop_of_an_image_merges_to_the_same_count(layout):
    family = "llava_next" if layout == "anyres" else "llava_next_fixed"
    model = tiny_model(family, "sdpa")
    images = random_processor(tiny(family))(
        text=[PROMPT], images=[picture(0).resize((112, 112))], return_tensors="pt"
    )
    with inject(model, build("tome"), "25%/tile", layout=layout) as trace:
        model.generate(**images, max_new_tokens=2)
    (numbers,) = trace.audits[0].kept_indices
    crops = [number // N for number in numbers if number >= 0]
    assert [crops.count(crop) for crop in range(5)] == [4] * 5
    before = module_state(model)
    with (
        pytest.raises(
            PrunerError,
            match=r"'tome': budgets of 5, 4, 4, 4, 4 for the 5 crops of an image.*such as 4/tile",
        ),
        inject(model, build("tome"), 21, layout=layout),
    ):
        model.generate(**images, max_new_tokens=1)
    assert module_state(model) == before, "a call that fails leaves no hooks"


def test_what_cannot_be_merged_is_refused(model, inputs):
    message = (
        "'tome': cannot merge 16 tokens into 1: a block merges at most half of its tokens, so "
        "that at least 2 remain after 3 blocks with schedule='constant'"
    )
    with pytest.raises(PrunerError, match=message), inject(model, build("tome"), 1):
        model.generate(**inputs, max_new_tokens=1)
    tokens = VisualTokens(torch.zeros(1, N, 4), output_places=torch.arange(N).float()[None])
    with pytest.raises(PrunerError, match=r"left \[16\] tokens per crop, and the budget is 4: .*"):
        build("tome").prune(tokens, 4)


def test_a_kernel_without_weights_is_refused(monkeypatch):
    model = tiny_model("llava", "sdpa")
    monkeypatch.setattr(
        model.model.vision_tower.config, "_attn_implementation_internal", "flash_attention_2"
    )
    with (
        pytest.raises(ValueError, match=r"'flash_attention_2': merging .* needs sdpa or eager"),
        inject(model, build("tome"), 4),
    ):
        pass


def test_a_block_of_another_form_is_refused(inputs, monkeypatch):
    """As in a release whose blocks scale what the MLP gets and what it is added to."""
    model = tiny_model("llava", "sdpa")
    blocks = [block for block in model.modules() if type(block).__name__ == "CLIPEncoderLayer"]
    forward = type(blocks[0]).forward

    @functools.wraps(forward)
    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    monkeypatch.setattr(type(blocks[0]), "forward", scaled)
    message = r"CLIPEncoderLayer has no form x \+ mlp\(norm\(x\)\) after its attention"
    with pytest.raises(ContractError, match=message), inject(model, build("tome"), 4):
        model.generate(**inputs, max_new_tokens=1)


def test_a_matching_by_hand():
    """CLS, then a, b, c, d, e: the first set is CLS, b, d; the second a, c, e.

    b is nearest to a (cosine 1), d to e (0.8; 0.6 to c). One merge: b into a.
    """
    cls, a, b, c, d, e = (
        torch.tensor([0.0, 1.0]),
        torch.tensor([2.0, 0.0]),
        torch.tensor([1.0, 0.0]),
        torch.tensor([0.0, 3.0]),
        torch.tensor([0.8, 0.6]),
        torch.tensor([1.0, 0.0]) * 0.5,
    )
    keys = [cls, a, b, c, d, e]
    one = build("tome").match(torch.stack(keys)[None], 1)
    assert one.kept.tolist() == [[0, 4, 1, 3, 5]]
    assert one.into.tolist() == [[0, 2, 2, 3, 1, 4]]
    assert soft_matching(keys, 1) == [(2, 1)]
    two = build("tome").match(torch.stack(keys)[None], 2)
    assert two.kept.tolist() == [[0, 1, 3, 5]]
    assert two.into.tolist() == [[0, 1, 1, 2, 1, 3]]  # d is as near to a as to e: the first
    assert soft_matching(keys, 2) == [(2, 1), (4, 1)]


@pytest.mark.parametrize(
    ("keep", "schedule", "plan"),
    [
        (192, "constant", [17] * 22 + [10]),  # 384 merges in 23 blocks
        (128, "constant", [20] * 22 + [8]),
        (64, "constant", [23] * 22 + [6]),
        (570, "decreasing", [2, 1, 1, 1, 1]),  # 2 - i / 11 for block i
        (576, "constant", [0] * 23),
    ],
)
def test_schedules_of_llava(keep, schedule, plan):
    merged = build("tome", schedule=schedule).merged_per_block(576, 23, keep)
    assert merged == plan + [0] * (23 - len(plan))


def test_a_decreasing_schedule_goes_from_twice_the_mean_to_nothing():
    pruner = build("tome", schedule="decreasing")
    assert sum(pruner.plan(11, 576, 23, 300)) < 276  # released rounding: 11 per block are too few
    merged = pruner.merged_per_block(576, 23, 300)
    assert sum(merged) == 276
    whole = [int(26 - 26 / 22 * block) for block in range(23)]  # r = 13
    assert merged[:17] == whole[:17]
    assert merged[17] == 276 - sum(whole[:17])
