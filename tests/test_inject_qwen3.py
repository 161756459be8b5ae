"""DeepStack of a tiny real Qwen3-VL: the first layers add features to the kept tokens alone."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from test_inject import STEPS, logits
from test_inject_qwen import SIZES, Chosen, encode, kept_rows, prompts, reference

from secateur.families import family_of
from secateur.geometry import random_model, random_processor, tiny
from secateur.injection import inject
from secateur.injection.session import adapter_for
from secateur.pruners import EXTRA, Pruner, Selection, VisualTokens

KEPT = {"0|0": [2, 11, 30], "0|1": [0, 7, 23], "1|0": [5, 6, 31]}
IMAGES = [[SIZES[0], SIZES[1]], [SIZES[2]]]


@pytest.fixture(scope="module")
def own(attention):
    return random_model(tiny("qwen3_vl"), attn_implementation=attention, std=0.2)


@pytest.fixture(scope="module")
def inputs():
    return encode(random_processor(tiny("qwen3_vl")), IMAGES)


def given(model, inputs, pruner):
    """What the language model receives of a prompt."""
    seen = []
    with inject(model, pruner, 3):
        handle = model.model.language_model.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        output = model.generate(**inputs, **STEPS)
        handle.remove()
    return seen[0], output


@torch.no_grad()
def test_the_references_see_it(own, inputs):
    """Without DeepStack, or with that of other tokens, they are far from the pruned model."""
    rows = prompts(own, inputs)
    kept = kept_rows(rows, [[KEPT["0|0"], KEPT["0|1"]], [KEPT["1|0"]]])
    _, output = given(own, inputs, Chosen(KEPT))
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    none = [dataclasses.replace(row, deep=[]) for row in kept]
    turned = [dataclasses.replace(row, deep=[level.flip(0) for level in row.deep]) for row in kept]
    assert (logits(output) - reference(own, kept, new)).abs().max() < 1e-4
    for wrong in (none, turned):
        assert (logits(output) - reference(own, wrong, new)).abs().max() > 0.1


@dataclass(frozen=True)
class Merges(Pruner):
    """The mean of all tokens, which has no place, then two tokens, one with other features."""

    name = "merges"
    paper = "-"
    status = "baseline"
    merges = True

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        mean = tokens.features.mean(1, keepdim=True)
        features = torch.cat([mean, mean, tokens.features[:, 9:10]], 1)
        indices = torch.tensor([EXTRA, 3, 9]).expand(len(mean), -1)
        return Selection(indices, features, custom_order=True)


@torch.no_grad()
def test_merged_tokens_keep_the_targets_and_tokens_without_a_place_get_none(own, inputs):
    rows = prompts(own, inputs)
    call, _ = given(own, inputs, Merges())
    mask, levels = call["visual_pos_masks"], call["deepstack_visual_embeds"]
    assert mask.sum(1).tolist() == [4, 2]
    first, second = torch.tensor([3, 9, 35 + 3, 35 + 9]), torch.tensor([3, 9])
    for number, level in enumerate(levels):
        want = torch.cat([rows[0].deep[number][first], rows[1].deep[number][second]])
        assert (level - want).abs().max() < 1e-5
    # the token without a place comes before the two of its image
    for row, starts in zip(mask, ([0, 1], [0]), strict=True):
        places = row.nonzero()[:, 0].view(-1, 2)
        assert len(places) == len(starts)
        assert not bool(row[places[:, 0] - 1].any())


def test_more_levels_than_layers_are_refused():
    config = tiny("qwen3_vl")
    config.text_config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="after 3 of 3 layers; pruning supports"):
        adapter_for(random_model(config, "meta"))


def test_a_model_with_experts_is_another_family():
    with pytest.raises(ValueError, match="'qwen3_vl_moe' is not supported; supported: llava"):
        family_of("qwen3_vl_moe")
