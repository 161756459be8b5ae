"""What pruners see of the towers of Qwen2.5-VL, Qwen2-VL and Qwen3-VL, against an eager tower.

Tokens come in raster order although Qwen2.5-VL's works in windows; attention is that received.
"""

import dataclasses
from dataclasses import dataclass, field
from importlib import import_module

import pytest
import torch
from test_inject_qwen import SIZES, encode
from torch import Tensor

from secateur.families import qwen2_5_vl as qwen
from secateur.geometry import random_model, tiny
from secateur.injection import inject
from secateur.injection.session import adapter_for
from secateur.pruners import Pruner, PrunerError, Selection, VisualTokens, build

GRIDS = [(1, 1), (1, 7), (5, 1), (4, 4), (5, 7), (6, 9), (13, 10)]


@dataclass(frozen=True)
class Looks(Pruner):
    """Keeps the first tokens, and what it was shown."""

    needs: frozenset = frozenset(  # type: ignore[assignment]
        {
            "features",
            "encoder_features",
            "saliency",
            "object_attention",
            "output_attention",
            "encoder_keys",
            "grid",
        }
    )
    seen: dict[str, VisualTokens] = field(default_factory=dict)

    name = "looks"
    paper = "-"
    status = "baseline"

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        self.seen.update(dict.fromkeys(tokens.sample_ids, tokens))
        return Selection(torch.arange(keep).expand(len(tokens.features), -1))


@pytest.fixture(scope="module")
def inputs(qwen_processor):
    return encode(qwen_processor, [[SIZES[0], SIZES[1]], [SIZES[2]]])


@pytest.fixture(scope="module")
def seen(qwen_model, inputs):
    looks = Looks()
    with inject(qwen_model, looks, 3):
        qwen_model.generate(**inputs, max_new_tokens=1)
    return [looks.seen[name] for name in ("0|0", "0|1", "1|0")]


@torch.no_grad()
def tower(model, inputs, **blocks: int) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """Softmax maps [H, P, P] of every image in the named blocks of an eager tower.

    Also the blocks' qkv [sum of P, 3C], in the tower's order.
    """
    model = random_model(model.config, attn_implementation="eager", std=0.2)
    module = import_module(type(model.model.visual).__module__)
    plain, maps, qkv = module.eager_attention_forward, {name: [] for name in blocks}, {}
    owner = {id(model.model.visual.blocks[block].attn): name for name, block in blocks.items()}

    def spying(attention, *args, **kwargs):
        output = plain(attention, *args, **kwargs)
        if id(attention) in owner:
            maps[owner[id(attention)]].append(output[1][0])
        return output

    for name, block in blocks.items():
        layer = model.model.visual.blocks[block].attn.qkv
        layer.register_forward_hook(
            lambda _module, _args, output, name=name: qkv.update({name: output})
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", spying)
        model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    return maps, qkv


def raster_order(rows: int, columns: int, side: int) -> list[int]:
    """Raster number of every token in the order of the tower, by walking through the windows."""
    return [
        row * columns + column
        for top in range(0, rows, side)
        for left in range(0, columns, side)
        for row in range(top, min(top + side, rows))
        for column in range(left, min(left + side, columns))
    ]


@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_order_of_windows_is_the_towers(grid, side):
    assert qwen.window_order(*grid, side).tolist() == raster_order(*grid, side)


def test_features_are_bit_for_bit_what_the_language_model_gets(qwen_model, inputs, seen):
    with torch.no_grad():
        features = qwen_model.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"]
        ).pooler_output
    for tokens, want, (width, height) in zip(seen, features, SIZES, strict=True):
        assert tokens.grid == (height // 28, width // 28)
        assert torch.equal(tokens.features[0], want)
        assert torch.equal(tokens.encoder_features, tokens.features)


def test_received_attention_and_keys_equal_those_of_an_eager_tower(qwen_model, inputs, seen):
    maps, qkv = tower(
        qwen_model, inputs, object=1, output=3
    )  # the tiny tower's blocks with full attention
    # the others have one window
    side = 2 if qwen_model.config.model_type == "qwen2_5_vl" else max(max(t.grid) for t in seen)
    _, keys, _ = qkv["output"].chunk(3, dim=1)
    keys = keys.split([4 * tokens.shape[1] for tokens in seen])
    for number, tokens in enumerate(seen):
        order = torch.tensor(raster_order(*tokens.grid, side)).argsort()

        def merged(patches: Tensor, order: Tensor = order) -> Tensor:
            return patches.unflatten(0, (-1, 4)).mean(1)[order]

        heads = merged(maps["output"][number].mean(1).T).T
        assert tokens.saliency.shape == (1, 4, tokens.shape[1])
        assert (tokens.saliency[0] - heads).abs().max() < 1e-6
        assert (tokens.output_attention[0] - heads.mean(0)).abs().max() < 1e-6
        assert (
            tokens.object_attention[0] - merged(maps["object"][number].mean((0, 1)))
        ).abs().max() < 1e-6
        assert not torch.allclose(tokens.object_attention, tokens.output_attention, atol=1e-3)
        assert (tokens.encoder_keys[0] - merged(keys[number])).abs().max() < 1e-5
        assert tokens.saliency.sum(2).allclose(
            torch.full((1, 4), 0.25)
        )  # every query's weights sum to one


def test_queries_are_taken_in_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(4, 50, 8, generator=generator) for _ in range(2))
    whole = qwen.received(queries, keys)
    assert (whole - (queries @ keys.transpose(1, 2)).softmax(-1).mean(1)).abs().max() < 1e-6
    for chunk in (1, 4 * 50 * 7):
        monkeypatch.setattr(qwen, "_CHUNK", chunk)
        assert (qwen.received(queries, keys) - whole).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("depth", "full", "blocks"),
    [
        (32, [7, 15, 23, 31], (15, 31)),
        (4, [3], (3, 3)),
        (8, [1, 3, 5, 7], (3, 7)),
        (12, [3, 11], (3, 11)),
    ],
)
def test_blocks_that_attention_is_read_from(depth, full, blocks):
    config = tiny("qwen2_5_vl")
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = depth, full
    adapter = adapter_for(random_model(config, "meta"))
    layers = [block.attn for block in adapter.visual.blocks]
    assert (layers.index(adapter.object), layers.index(adapter.attention)) == blocks
    config.vision_config.fullatt_block_indexes = []
    with pytest.raises(ValueError, match="no block with full attention"):
        adapter_for(random_model(config, "meta"))


@pytest.mark.parametrize(("depth", "blocks"), [(32, (15, 31)), (4, (1, 3)), (12, (5, 11))])
def test_every_block_of_qwen2_vl_has_full_attention(depth, blocks):
    config = tiny("qwen2_vl")
    config.vision_config.depth = depth
    adapter = adapter_for(random_model(config, "meta"))
    layers = [block.attn for block in adapter.visual.blocks]
    assert (layers.index(adapter.object), layers.index(adapter.attention)) == blocks


def test_images_are_what_they_are_among_others(qwen_model, inputs, seen):
    arguments = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")} | {
        "return_dict": True
    }
    calls = list(adapter_for(qwen_model).one_by_one(arguments))
    assert len(calls) == len(seen)
    for tokens, call in zip(seen, calls, strict=True):
        with torch.no_grad():
            (features,) = qwen_model.model.get_image_features(**call).pooler_output
        assert (tokens.features[0] - features).abs().max() < 1e-4


def test_visionzip_reads_no_row_of_keys_for_cls(seen):
    tokens, pruner = seen[0], build("visionzip", keep_cls=False)
    row = torch.ones(1, 1, tokens.encoder_keys.shape[2])
    with_row = dataclasses.replace(tokens, encoder_keys=torch.cat([row, tokens.encoder_keys], 1))
    without, selection = pruner.prune(tokens, 13), pruner.prune(with_row, 13)
    assert torch.equal(without.indices, selection.indices)
    assert torch.equal(without.features, selection.features)
    assert (without.indices[0, :11].diff() > 0).all()  # 11 dominant, 2 contextual tokens
    for keys in (tokens.encoder_keys[:, 1:], torch.cat([row, row, tokens.encoder_keys], 1)):
        with pytest.raises(
            PrunerError, match=r"encoder_keys have shape .*expected \[B, N or 1\+N, E\] with N = 35"
        ):
            pruner.prune(dataclasses.replace(tokens, encoder_keys=keys), 13)


def test_several_frames_are_refused(qwen_model, inputs):
    grid = torch.tensor([[2, 4, 4]])
    pixels = inputs["pixel_values"][:32]
    with inject(qwen_model, Looks(), 3), pytest.raises(ValueError, match="an image of 2 frames"):
        qwen_model.model.get_image_features(pixels, grid)


def test_a_merging_method_hands_over_features_as_they_are(qwen_model):
    features = torch.randn(3, 64)
    assert torch.equal(adapter_for(qwen_model).project(features), features)
