"""The formulas against torch's counter: on the meta device, and on tiny models with hooks."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import picture
from synthetic import layer_tokens as layer_inputs
from synthetic import visual_tokens
from test_inject_onevision import encode as encode_onevision
from test_inject_onevision import setting as onevision
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, DynamicCache
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from secateur.efficiency.flops import conventions, count, count_row, head, prefill, projector, tower
from secateur.efficiency.flops_published import explain
from secateur.geometry import config_of, random_model, random_processor, reduced, tiny
from secateur.injection import Sample, inject
from secateur.pruners import REGISTRY, InLLMPruner, Pruner, build
from secateur.pruners.base import ImageShape
from secateur.pruners.in_llm import PromptShape

CLIP = [(24, 24)]
# crops and visual tokens of a prompt
MODELS = {
    "llava_1_5_7b": (CLIP, 576),
    "llava_1_5_13b": (CLIP, 576),
    "llava_next_7b": (CLIP * 5, 2880),
    "llava_next_13b": (CLIP * 5, 2880),
    "llava_onevision_7b": ([(27, 27)] * 3, 2187),
    "qwen2_vl_7b": ([(36, 36)], 1296),
    "qwen2_5_vl_7b": ([(36, 36)], 1296),
    "qwen2_5_vl_3b": ([(36, 36)], 1296),
    "qwen3_vl_2b": ([(32, 32)], 1024),
    "internvl3_1b": ([(16, 16)] * 3, 768),
}


def plan(name: str, tokens: int) -> list[int]:
    return [tokens] * config_of(name).text_config.num_hidden_layers


def measured(call) -> int:
    """FLOPs of a call, without the angles of the rotary embedding.

    Older releases of transformers compute these as a product of matrices.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    angles = [
        sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
        if name.endswith("rotary_emb")
    ]
    return counter.get_total_flops() - sum(angles)


def shapes(config):
    return random_model(config, "meta", torch.bfloat16)


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", MODELS)
def test_the_language_model_at_true_geometry(name):
    config, (_, visual) = config_of(name), MODELS[name]
    model, states = shapes(config), empty(1, visual + 62, config.text_config.hidden_size)
    assert measured(lambda: model.model.language_model(inputs_embeds=states)) == sum(
        work.total for work in prefill(config, plan(name, visual), 62)
    )
    assert measured(lambda: model.lm_head(states[:, :1])) == head(config)


@pytest.mark.parametrize("name", ["llava_1_5_7b", "llava_next_13b", "qwen2_vl_7b", "qwen2_5_vl_7b"])
def test_decoding_at_true_width(name):
    config = reduced(config_of(name), layers=2)
    language, cache, width = (
        random_model(config, "meta").model.language_model,
        DynamicCache(),
        config.text_config.hidden_size,
    )
    language(
        inputs_embeds=torch.empty(1, 162, width, device="meta"),
        past_key_values=cache,
        use_cache=True,
    )
    step = torch.empty(1, 1, width, device="meta")
    first, second = (
        measured(lambda: language(inputs_embeds=step, past_key_values=cache, use_cache=True))
        + head(config)
        for _ in range(2)
    )
    flops = count(config, layer_tokens=[100, 100], text_tokens=62, crops=CLIP, new_tokens=3)
    assert flops.step == first
    assert flops.decode == first + second
    assert count(config, layer_tokens=[100, 100], text_tokens=62, crops=CLIP).decode == 0


@pytest.mark.parametrize(
    "name",
    ["llava_1_5_7b", "llava_next_7b", "llava_next_13b", "llava_onevision_7b", "internvl3_1b"],
)
def test_a_tower_of_crops_at_true_geometry(name):
    config, (crops, _) = config_of(name), MODELS[name]
    side = 448 if "internvl" in name else config.vision_config.image_size
    vision_tower, pixels = shapes(config).model.vision_tower, empty(len(crops), 3, side, side)
    assert measured(lambda: vision_tower(pixels)) == tower(config, crops).total


@pytest.mark.parametrize("name", ["qwen2_vl_7b", "qwen2_5_vl_7b", "qwen3_vl_8b"])
def test_qwens_tower_at_true_geometry(name, monkeypatch):
    config, crops = (
        config_of(name),
        [(6, 5), (4, 4)],
    )  # windows of 4 x 4 tokens in Qwen2.5-VL, smaller at the edges
    visual = shapes(config).model.visual
    patches = empty(4 * 46, 3 * 2 * config.vision_config.patch_size**2)
    grid = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in crops])
    # positions are made from the grid, which has to have values
    visual.rotary_pos_emb.register_forward_pre_hook(
        lambda _, args: tuple(
            part.to("meta") if isinstance(part, torch.Tensor) else part for part in args
        )
    )
    if "qwen3" in name:
        weights = qwen3.get_vision_interpolation_indices_and_weights
        monkeypatch.setattr(
            qwen3,
            "get_vision_interpolation_indices_and_weights",
            lambda *args, **kwargs: [part.to("meta") for part in weights(*args, **kwargs)],
        )
    both = measured(lambda: visual(patches, grid_thw=grid))
    assert both == tower(config, crops).total + projector(config, crops).total


@pytest.mark.parametrize("name", MODELS)
def test_the_projector_at_true_geometry(name):
    config, (crops, visual) = config_of(name), MODELS[name]
    core = shapes(config).model
    if "qwen" in name:
        # those of DeepStack take as many tokens
        mergers = [core.visual.merger, *getattr(core.visual, "deepstack_merger_list", [])]
        entering = empty(4 * visual, 1024 if "qwen3" in name else 1280)
        seen = measured(lambda: [merger(entering) for merger in mergers])
    else:
        width = 4 * 1024 if "internvl" in name else config.vision_config.hidden_size
        entering = empty(len(crops), visual // len(crops), width)
        seen = measured(lambda: core.multi_modal_projector(entering))
    assert seen == projector(config, crops).total


# method -> (fields, visual tokens of the four layers); the counter sees the pruner's products too
METHODS = {
    "none": ({}, (16, 16, 16, 16)),
    "random": ({}, (8, 8, 8, 8)),
    "fastervlm": ({}, (8, 8, 8, 8)),
    "divprune": ({}, (8, 8, 8, 8)),
    "scope": ({}, (8, 8, 8, 8)),
    "hiprune": ({}, (8, 8, 8, 8)),
    "vispruner": ({}, (8, 8, 8, 8)),
    "tome": ({}, (8, 8, 8, 8)),
    "fastv": ({"layer": 1}, (16, 5, 5, 5)),
    "pyramiddrop": ({"stages": (1, 2, 3)}, (16, 8, 4, 2)),
    "dart": ({"layer": 1}, (16, 4, 4, 4)),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_model_with_its_hooks(method, attention):
    """FastV, for example, costs 2 L d: one query over the L positions before the cut."""
    config, (options, layer_tokens) = tiny("llava"), METHODS[method]
    model = random_model(config, std=0.2, attn_implementation=attention)
    text = "USER: <image>\nwhat is this, and why? ASSISTANT:"
    inputs = random_processor(config)(text=[text], images=[picture(0)], return_tensors="pt")
    pruner = build(method, **options)
    with inject(model, pruner, "full" if method == "none" else 8) as trace:
        seen = measured(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
    record = trace.audits[0]
    row = {
        "visual_tokens": 16,
        "new_tokens": 1,
        "layer_tokens": layer_tokens,
        "prompt_tokens": record.prompt_tokens,
    }
    flops = count_row(config, row, pruner)
    assert record.layer_tokens == layer_tokens
    assert seen == flops.first_token
    assert (flops.pruner > 0) == (method not in ("none", "random"))
    if method == "fastv":
        assert flops.pruner == 2 * inputs["input_ids"].shape[1] * 64


def test_the_embedded_model():
    config = AutoConfig.from_pretrained(Path(__file__).parents[1] / "eval/shapes/model")
    model = random_model(config)
    pixels = torch.zeros(1, 3, 96, 96)
    assert measured(lambda: model.model.vision_tower(pixels)) == tower(config, [(12, 12)]).total


@pytest.mark.parametrize(
    ("convention", "model", "text", "printed"),
    [
        ("macs_visual", "llava_1_5_7b", 0, {576: 3.82, 192: 1.25, 128: 0.83, 64: 0.42}),
        ("macs_visual_fastv", "llava_1_5_7b", 0, {576: 2.99, 192: 0.98}),
        ("flops_prompt", "llava_next_7b", 62, {2880: 42.6, 320: 5.02}),  # PromPrune, Table 6
        (
            "flops_linear",
            "llava_1_5_7b",
            49,
            {576: 8.63, 192: 3.56, 128: 2.71, 64: 1.87},
        ),  # HiPrune, Table 5
    ],
)
def test_published_numbers_by_their_convention(convention, model, text, printed):
    for tokens, value in printed.items():
        digits = len(str(value).split(".")[1])
        flops = conventions(config_of(model), plan(model, tokens), text, MODELS[model][0])[
            convention
        ]
        assert round(flops / 1e12, digits) == value


def test_pyramiddrops_own_number():
    """arXiv 2410.17247, ablation: 1.78 T with half of the tokens dropped before 8, 16 and 24."""
    layer_tokens = [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert (
        round(
            conventions(config_of("llava_1_5_7b"), layer_tokens, 0, CLIP)["macs_visual"] / 1e12, 2
        )
        == 1.78
    )


def test_grouped_queries_cost_less_than_the_literature_writes():
    config, layer_tokens = config_of("qwen2_5_vl_7b"), plan("qwen2_5_vl_7b", 1296)
    full = 28 * (4 * 1296 * 3584**2 + 2 * 1296**2 * 3584 + 3 * 1296 * 3584 * 18944)
    counted = conventions(config, layer_tokens, 0, [(36, 36)])["macs_visual"]
    assert full - counted == 28 * 2 * 1296 * 3584 * (3584 - 512)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_pruned_qwen_with_its_hooks(family):
    config = tiny(family)
    model, processor = random_model(config, std=0.2), random_processor(config)
    text = "<|vision_start|><|image_pad|><|vision_end|>what is this?"
    inputs = processor(text=[text], images=[picture(0).resize((112, 168))], return_tensors="pt")
    pruner = build("divprune")
    with inject(model, pruner, 8) as trace:
        seen = measured(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
    record = trace.audits[0]
    row = {
        "crops": [(6, 4)],
        "new_tokens": 1,
        "layer_tokens": record.layer_tokens,
        "prompt_tokens": record.prompt_tokens,
    }
    assert record.layer_tokens == (8,) * 4
    assert seen == count_row(config, row, pruner).first_token


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        *(("none", rows) for rows in ([[1]], [[0, 2]])),
        # its Gram matrix uses symmetry from 128 tokens on, which the formula leaves out
        *(("trimtokenator", rows) for rows in ([[0]], [[0, 2]])),
        *(("fastv", rows) for rows in ([[1]], [[0, 2]])),
    ],
)
def test_a_pruned_onevision_with_its_hooks(method, rows):
    """Tiles that were cut or resampled, and whole images that share a prompt."""
    (model, _), inputs = onevision("sdpa"), encode_onevision(rows)
    pruner = build(method, **({"layer": 1} if method == "fastv" else {}))
    with inject(model, pruner, "full" if method == "none" else "50%") as trace:
        trace.announce([Sample("one", (7, 8, 9))])
        seen = measured(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
    (record,) = trace.audits
    row = {"crops": record.crops, "sections": record.sections, "new_tokens": 1}
    row |= {"layer_tokens": record.layer_tokens, "prompt_tokens": record.prompt_tokens}
    assert seen == count_row(model.config, row, pruner).first_token


@pytest.mark.parametrize("name", MODELS)
def test_a_pruner_is_counted_at_the_towers_width(name):
    """FasterVLM costs 2 (N + 1) C a crop: one query over the tower's keys."""
    config, (crops, visual) = config_of(name), MODELS[name]
    flops = count(
        config,
        layer_tokens=plan(name, visual // 9),
        text_tokens=62,
        crops=crops,
        pruner=build("fastervlm"),
    )
    width = 1280 if "qwen2" in name else config.vision_config.hidden_size
    assert flops.pruner == 2 * (visual + len(crops)) * width


def test_a_method_without_a_count_says_so():
    options = {"layer_tokens": plan("llava_1_5_7b", 64), "text_tokens": 62, "crops": CLIP}
    config = config_of("llava_1_5_7b")
    counted, unknown = (count(config, pruner=p, **options) for p in (build("random"), Pruner()))
    assert unknown.pruner is None
    assert unknown.first_token == counted.first_token


# one image of N tokens of which K stay, D wide in the LLM and C in the tower, in 2 heads; a
# question
# of S segments; a prompt of T text positions
N, K, D, C, S, T = 48, 12, 32, 24, 2, 9
CAPTURE = 2 * (N + 1) * C  # the attention of CLS, which the hooks compute
CLIP_COSINE = 2 * N * S * D
CHOLESKY = 2 * N * K * (K - 1) // 2
# what the counter sees in `select` beyond the method's own count, by cause
REMAINDERS = {
    # K^2 N stands for the triangle of Cholesky updates
    "cdpruner": CLIP_COSINE + CHOLESKY - 2 * N * K * K,
    "fastervlm": -CAPTURE,
    "fastv": -2 * (N + T) * D,  # the hooks compute the scores
    "fsr": CLIP_COSINE - CAPTURE,
    "hired": -2 * CAPTURE,
    "hiprune": -2 * 2 * (N + 1) ** 2 * C,  # the hooks compute both attention maps
    "holov": -CAPTURE,
    # the hooks compute queries and keys; the test keeps 12 tokens, not 55%; a round of suppression
    "pact": -2 * (N + T) * D * 2 * D - 2 * (26**2 - K**2) * D + 2 * K * K,
    # with fewer channels than tokens, the entropy has a D x D Gram matrix of its own
    "promprune": 2 * D * D * N + CHOLESKY - CAPTURE,
    "prumerge": 2 * (K - 1) * N * C,  # merging
    "prumerge_plus": 2 * (K - 1) * N * C,
    # a sixth product of the components, their rotation, 6 rounds of suppression
    "prunesid": 2 * N * C * 3 + 2 * N * 3 * 3 + 6 * 2 * N * N - CAPTURE,
    "prunesid_dyn": 2 * N * C * 3 + 2 * N * 3 * 3 + 6 * 2 * N * N - CAPTURE,
    # the hooks compute queries, keys and scores
    "pyramiddrop": -2 * (D * D + (N + T) * D * D + (N + T) * D),
    "scope": -CAPTURE,
    # the hooks compute raters and scores; torch's counter skips the distances of the best 11
    "sparsevlm": -2 * N * (N + T) * D - 2 * T * (N + T) * D - 2 * 11 * 11 * D,
    "sppruner": CLIP_COSINE + 2 * K * 6 * D - CAPTURE,  # 6 tokens are merged
    "trim": CLIP_COSINE,  # as products
    # the hooks compute similarities of keys of size C / 2, and means with their sizes, in 3 blocks
    # that merge 12 tokens each
    "tome": -2 * (25 * 24 + 19 * 18 + 13 * 12) * C // 2 - 2 * 12 * (37 + 25 + 13) * (C + 1),
    "visionzip": 2 * 2 * 37 * C // 2 - CAPTURE,  # similarity of 2 targets and 37 others
    "vispruner": -CAPTURE,
    "zspaprune": 2 * N * D,  # relevance
}


def image_inputs():
    draw = torch.Generator().manual_seed(0)
    names = {
        "encoder_features": N,
        "last_queries": N + 1,
        "last_keys": N + 1,
        "encoder_keys": N + 1,
    }
    encoder = {name: torch.randn(1, rows, C, generator=draw) for name, rows in names.items()}
    tokens = dataclasses.replace(visual_tokens(1, (6, 8), width=D), **encoder)
    return dataclasses.replace(tokens, cls_token=torch.randn(1, C, generator=draw))


@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_what_a_selection_costs(method):
    """Every registered method has a count; with the remainder above it is what torch counts."""
    pruner = build(method)
    if isinstance(pruner, InLLMPruner):
        tokens = layer_inputs(1, N, width=D)
        flops = pruner.flops(PromptShape((N, pruner.tokens_after(N, K)), T, D, D, D))
    else:
        tokens = image_inputs()
        flops = pruner.flops(ImageShape(N, K, D, C, encoder_blocks=3, encoder_heads=2))
    assert measured(lambda: pruner.prune(tokens, K)) == flops + REMAINDERS.get(method, 0)


@pytest.mark.parametrize(
    ("options", "remainder"),
    [
        ({"grouping": "kmeans"}, 0),
        ({"grouping": "kmeans", "groups": 7}, 0),
        ({"grouping": "random"}, 0),
        ({"groups": 7}, 2 * N * C * 7 + 2 * N * 7 * 7),  # a sixth product and the rotation
    ],
)
def test_what_other_groups_of_prunesid_cost(options, remainder):
    pruner = build("prunesid", nms=False, score="norm", **options)
    counted = pruner.flops(ImageShape(N, K, D, C)) + remainder
    assert measured(lambda: pruner.prune(image_inputs(), K)) == counted


@pytest.mark.parametrize(
    ("method", "options", "remainder"),
    [
        ("scope", {"saliency": "none"}, 0),
        ("scope", {"saliency": "only"}, 0),
        ("promprune", {"stage2": "farthest_point", "entropy": "attention"}, 0),
        ("promprune", {"stage2": "facility_location", "entropy": "feature_norm"}, 0),
        ("promprune", {"stage2": "facility_location", "salient": 3}, 2 * D * D * N),
    ],
)
def test_what_the_ablations_of_scope_and_promprune_cost(method, options, remainder):
    pruner = build(method, **options)
    counted = pruner.flops(ImageShape(N, K, D, C)) - CAPTURE + remainder
    assert measured(lambda: pruner.prune(image_inputs(), K)) == counted


def test_errors_name_the_fix():
    config = config_of("llava_next_7b")
    row = {"visual_tokens": 2880, "layer_tokens": [64] * 32, "prompt_tokens": 100, "new_tokens": 1}
    with pytest.raises(ValueError, match="need a column `crops`"):
        count_row(config, row)
    assert count_row(config, row | {"crops": CLIP * 5}).tower == tower(config, CLIP * 5)
    with pytest.raises(ValueError, match="3 counts in layer_tokens for 32 layers"):
        count(config, layer_tokens=[64] * 3, text_tokens=1, crops=CLIP)
    with pytest.raises(ValueError, match="model type 'clip' is not supported"):
        tower(AutoConfig.for_model("clip"), CLIP)


def test_one_length_of_text_must_explain_several_budgets():
    """Part of HiPrune's Table 5; a number no text fits, one that any fits, one without text."""
    rows = [
        ("a", "none", 576, "flops", 8.63),
        ("a", "hiprune", 192, "flops", 3.56),
        ("a", "hiprune", 64, "flops", 1.87),
        ("a", "fsr", 64, "flops", 1.95),
        ("b", "hiprune", 64, "flops", 1.87),
        ("c", "fastv", 192, "flops", 1.25),
        ("d", "none", 576, "macs", 4.521),
        ("d", "vispruner", 64, "macs", 1.138),
        ("e", "none", None, "flops", 8.63),
    ]
    reported = pd.DataFrame(
        rows, columns=["paper", "method", "budget_tokens", "quantity", "value"]
    ).assign(table="T", model="llava_1_5_7b", unit="T")
    found = explain(reported).groupby("paper")["explained by"].agg(list)
    assert found["a"][:3] == ["flops_linear with 48.9 to 49.2 text tokens"] * 3
    assert found["a"][3] == ""
    assert found["b"] == [""]
    assert found["c"] == ["macs_visual"]
    assert found["d"] == ["flops_linear with 79.9 to 80.1 text tokens"] * 2  # FSR, Table 7
    assert found["e"] == [""]
