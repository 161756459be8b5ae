"""PACT: its selection against a literal reading, and attention weighted by the sizes of clusters.

A token of size s has the effect of s equal tokens that see each other, and the reference has these.
"""

import sys
from pathlib import Path

import pytest
import torch
from conftest import picture, tiny_model
from synthetic import layer_tokens, rows_of

from secateur.geometry import random_processor, tiny
from secateur.injection import inject
from secateur.pruners import LayerTokens, build
from secateur.pruners.pact import Pact

sys.path.append(str(Path(__file__).parent / "reference"))
from literal_pact import importance, pact

LAYER = 2
STEPS = {
    "do_sample": False,
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "output_logits": True,
    "return_dict_in_generate": True,
}
FAMILIES = {
    "llava": "USER: <image>\nWhat is this? ASSISTANT:",
    "qwen2_5_vl": "USER: <|vision_start|><|image_pad|><|vision_end|>What is this? ASSISTANT:",
}


@pytest.mark.parametrize("kind", ["gauss", "clusters"])
@pytest.mark.parametrize("cutoff", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("count", "keep"), [(30, 16), (9, 8), (12, 1)])
def test_the_selection_equals_a_literal_reading(kind, cutoff, count, keep):
    tokens = layer_tokens(3, count, seed=count, kind=kind)
    pruner = build("pact", cutoff=cutoff, recovery=1.3)
    selection = pruner.prune(tokens, keep)
    for row, width in enumerate(selection.counts.tolist()):
        alone = rows_of(tokens, [row])
        scores = pruner.importance(alone)[0]
        assert torch.allclose(scores, torch.tensor(importance(alone)), rtol=1e-4)
        centres, sizes, means = pact(alone, keep, cutoff, 1.3)
        assert selection.indices[row, :width].tolist() == centres
        assert selection.sizes[row, :width].tolist() == sizes
        assert torch.allclose(selection.features[row, :width], torch.stack(means), atol=1e-5)


def test_clusters_by_hand():
    """Unit keys at 0, 10, 60, 70 and 180 degrees, cutoff 0.02 (11.5 degrees): two pairs, one alone.

    The last is the least important and dropped; with a recovery of 100 it would come back.
    """
    angles = torch.tensor([0.0, 10, 60, 70, 180]).deg2rad()
    keys = torch.stack([angles.cos(), angles.sin()], 1)
    states = torch.tensor([[1.0, 0], [3, 0], [0, 1], [0, 3], [0.1, 0], [9, 9]])
    tokens = LayerTokens(
        visual=torch.arange(5)[None],
        text=torch.tensor([[False] * 5 + [True]]),
        hidden=states[None],
        next_queries=torch.zeros(1, 1, 6, 2),  # attention is uniform, so that norms decide
        next_keys=torch.ones(1, 1, 6, 2),
        next_rotated_keys=torch.cat([keys, keys[:1]])[None, None],
    )
    selection = build("pact", cutoff=0.02).prune(tokens, 4)
    # 10 and 60 degrees are nearest to the others, and the densest of their pairs
    assert selection.indices.tolist() == [[1, 2]]
    assert selection.sizes.tolist() == [[2, 2]]
    assert selection.features.tolist() == [[[2, 0], [0, 2]]]
    back = build("pact", cutoff=0.02, recovery=100).prune(tokens, 4)
    assert back.sizes.tolist() == [[2, 3]]


def reference(model, states, sizes, positions, layer, weighted):
    """Logits of prompt states [P, D] that entered `layer`: a state of size s stands s times."""
    language = model.model.language_model
    copies = sizes if weighted else torch.ones_like(sizes)
    group = torch.repeat_interleave(torch.arange(len(states)), copies)
    x = states[group][None]
    rotary = language.rotary_emb(x, positions[..., group])
    seen = group[None] <= group[:, None]
    mask = torch.where(seen, 0.0, torch.finfo(x.dtype).min)[None, None]
    for block in language.layers[layer:]:
        output = block(x, attention_mask=mask, position_embeddings=rotary)
        x = output[0] if isinstance(output, tuple) else output
    last = copies.cumsum(0) - 1
    return model.lm_head(language.norm(x))[0, last]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"proportional_attention": False}], ids=str)
@torch.no_grad()
def test_later_layers_and_steps_weigh_clusters(family, kernel, options, monkeypatch):
    model = tiny_model(family, kernel)
    inputs = random_processor(tiny(family))(
        text=[FAMILIES[family]], images=[picture(0).resize((112, 112))], return_tensors="pt"
    )
    pruner, seen = build("pact", layer=LAYER, cutoff=0.6, **options), {}
    select = Pact.select

    def recorded(self, tokens, keep):
        seen["tokens"], seen["keep"] = tokens, keep
        return select(self, tokens, keep)

    monkeypatch.setattr(Pact, "select", recorded)
    with inject(model, pruner, "full") as trace:
        output = model.generate(**inputs, **STEPS)
    tokens, keep = seen["tokens"], seen["keep"]
    count = tokens.visual.shape[1]
    assert keep == int(0.55 * count)
    centres, sizes, means = pact(tokens, keep, 0.6, 1.5)
    assert 1 < len(centres) < keep
    assert max(sizes) > 1
    assert trace.audits[0].layer_tokens == (count, count, len(centres), len(centres))
    assert list(trace.audits[0].kept_indices[0]) == centres

    # the answer's tokens, after the prompt, run through the first layers on the unpruned prompt
    full = output.sequences[:, :-1]
    extra = {"mm_token_type_ids"} & inputs.keys()
    more = {name: torch.nn.functional.pad(inputs[name], (0, 3)) for name in extra}
    fed = dict(inputs, input_ids=full, attention_mask=torch.ones_like(full), **more)
    caught = {}
    language = model.model.language_model
    with_layer = language.layers[LAYER].register_forward_pre_hook(
        lambda _, args, kwargs: caught.update(
            kwargs, x=args[0] if args else kwargs["hidden_states"]
        ),
        with_kwargs=True,
    )
    outer = language.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: caught.update(
            positions=args[1] if len(args) > 1 else kwargs["position_ids"]
        ),
        with_kwargs=True,
    )
    model(**fed)
    with_layer.remove()
    outer.remove()
    states, positions = caught["x"][0].clone(), caught["positions"]
    visual = tokens.visual[0]
    states[visual[centres]] = torch.stack(means)
    weights = torch.ones(len(states), dtype=torch.long)
    weights[visual[centres]] = torch.tensor(sizes)
    stays = torch.ones(len(states), dtype=torch.bool)
    stays[visual] = False
    stays[visual[centres]] = True
    logits = reference(
        model,
        states[stays],
        weights[stays],
        positions[..., stays],
        LAYER,
        pruner.proportional_attention,
    )
    assert (torch.cat(output.logits) - logits[-4:]).abs().max() < 1e-4


def test_batches_are_refused():
    model = tiny_model("llava", "sdpa")
    inputs = random_processor(tiny("llava"))(
        text=[FAMILIES["llava"]] * 2, images=[picture(0), picture(1)], return_tensors="pt"
    )
    with (
        pytest.raises(ValueError, match=r"2 prompts in a batch: pruner 'pact' .* batch size 1"),
        inject(model, build("pact", layer=LAYER), "full"),
    ):
        model.generate(**inputs, max_new_tokens=1)


def test_a_kernel_without_weights_is_refused(monkeypatch):
    model = tiny_model("llava", "sdpa")
    config = model.model.language_model.config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    message = r"'flash_attention_2': pruner 'pact' weights the attention .* needs sdpa or eager"
    with pytest.raises(ValueError, match=message), inject(model, build("pact"), "full"):
        pass
    with inject(model, build("pact", proportional_attention=False), "full"):
        pass
