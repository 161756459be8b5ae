"""LLaVA-NeXT in its three layouts, on tiny real models: crops, tiles and newlines."""

import copy
import functools
from dataclasses import dataclass, field

import pytest
import torch
from conftest import picture
from PIL import Image
from test_inject import STEPS, Fixed, logits
from test_inject_layers import prompts, reference
from torch import Tensor
from transformers import BatchFeature

from secateur.families.base import NEWLINE
from secateur.geometry import random_model, random_processor, tiny
from secateur.injection import Sample, inject
from secateur.inputs import Inputs, Prompt
from secateur.pruners import EXTRA, Selection, VisualTokens, build
from secateur.pruners.base import Pruner
from secateur.pruners.cdpruner import CDPruner

N, SIDE = 16, 4  # tokens of a crop
SIZES = [(90, 60), (60, 150), (112, 112)]  # width, height: other numbers of crops each
TEXT = "USER: <image>\n{} ASSISTANT:"
QUESTIONS = ["what is this, and why?", "short", "another length"]


@functools.cache
def setting(layout: str, attention: str):
    config = tiny("llava_next")
    model = random_model(config, "cpu", torch.float32, attention, seed=0, std=0.2)
    return model, Inputs(random_processor(config), model.config, layout=layout)


@pytest.fixture
def anyres(attention):
    return setting("anyres", attention)


@pytest.fixture
def fixed(attention):
    return setting("fixed2880", attention)


@pytest.fixture
def crops(attention):
    return setting("crops", attention)


@pytest.fixture(params=["anyres", "crops", "fixed2880"])
def any_layout(request, attention):
    return setting(request.param, attention)


def image(seed: int) -> Image.Image:
    return picture(seed).resize(SIZES[seed % 3])


def encode(inputs: Inputs, batch: int, first: int = 0) -> BatchFeature:
    return inputs.collate(
        [
            inputs(Prompt(TEXT.format(QUESTIONS[i]), [image(i)], ""))
            for i in range(first, first + batch)
        ]
    )


@torch.no_grad()
def crops_of(model, inputs) -> list[Tensor]:
    """Projected crops of every image, [crops, N, D], from the tower itself."""
    core = model.model
    pixels = inputs["pixel_values"]
    real = [
        int(p.flatten(1).any(1).sum()) for p in pixels
    ]  # behind an image's crops the batch is padded with zeros
    found = []
    for crops, number in zip(pixels, real, strict=True):
        hidden = core.vision_tower(crops[:number], output_hidden_states=True).hidden_states[-2][
            :, 1:
        ]
        found.append(core.multi_modal_projector(hidden))
    return found


def mosaic(rows: int = 2, columns: int = 2) -> Tensor:
    """[rows SIDE, columns SIDE] numbers of the tiles' tokens, as they lie in the image."""
    tiles = torch.arange(N, N * (1 + rows * columns)).view(rows, columns, SIDE, SIDE)
    return tiles.permute(0, 2, 1, 3).reshape(rows * SIDE, columns * SIDE)


@torch.no_grad()
def language(model, embeds: Tensor, new: Tensor) -> Tensor:
    """Logits of the language model on a prompt [L, D] and its answer, without cache or hooks."""
    sequence = torch.cat([embeds, model.get_input_embeddings()(new[:-1])])[None]
    ones = torch.ones(sequence.shape[:2], dtype=torch.long)
    hidden = model.model.language_model(
        inputs_embeds=sequence, attention_mask=ones, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[0, len(embeds) - 1 :])


@torch.no_grad()
def around(model, inputs, row: int, visual: Tensor) -> Tensor:
    """A row's prompt with `visual` [K, D] in place of its image."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    places = (ids == model.config.image_token_id).nonzero()[:, 0]
    text = model.get_input_embeddings()(ids)
    return torch.cat([text[: places[0]], visual, text[places[-1] + 1 :]])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_keeping_all_of_anyres_changes_no_bit(anyres, batch, positions):
    model, inputs = anyres[0], encode(anyres[1], batch)
    plain = model.generate(**inputs, **STEPS)
    with inject(model, build("none"), "full", positions) as trace:
        kept = model.generate(**inputs, **STEPS)
    assert torch.equal(logits(kept), logits(plain))
    places = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    assert [record.kept_tokens for record in trace.audits] == [(count,) for count in places]


@pytest.mark.parametrize(
    "method",
    ["fastervlm", "scope", "divprune", "visionzip", "prumerge", "promprune", "prunesid", "hiprune"],
)
def test_methods_run_and_rows_equal_the_rows_alone(any_layout, method):
    model, inputs = any_layout
    with inject(model, build(method), "50%", layout=inputs.layout) as trace:
        together = model.generate(**encode(inputs, 2), **STEPS)
        for row in range(2):
            alone = model.generate(**encode(inputs, 1, row), **STEPS)
            assert (logits(alone)[0] - logits(together)[row]).abs().max() < 1e-4
    if inputs.layout == "fixed2880":
        assert all(record.visual_tokens == (5 * N,) for record in trace.audits)
        assert all(record.kept_tokens == (5 * N // 2,) for record in trace.audits)
    first, second, *alone = trace.audits
    assert [first.kept_indices, second.kept_indices] == [record.kept_indices for record in alone]


def test_the_fixed_layout_is_every_token_of_every_crop_without_newlines(fixed):
    model, inputs = fixed[0], encode(fixed[1], 2)
    with inject(model, build("none"), "full", layout="fixed2880") as trace:
        kept = model.generate(**inputs, **STEPS)
    for row, crops in enumerate(crops_of(model, inputs)):
        assert len(crops) == 5
        tokens = crops.flatten(0, 1)
        visual = torch.cat([tokens[:N], tokens[mosaic().flatten()]])
        want = language(
            model,
            around(model, inputs, row, visual),
            kept.sequences[row, inputs["input_ids"].shape[1] :],
        )
        assert (logits(kept)[row] - want).abs().max() < 1e-4
        assert trace.audits[row].visual_tokens == trace.audits[row].kept_tokens == (5 * N,)


@pytest.mark.parametrize(("first", "rows", "columns"), [(0, 2, 2), (1, 3, 1), (2, 2, 2)])
def test_the_layout_of_crops_is_every_token_of_the_checkpoints_crops(crops, first, rows, columns):
    model, inputs = crops[0], encode(crops[1], 1, first)
    with inject(model, build("none"), "full", layout="crops") as trace:
        kept = model.generate(**inputs, **STEPS)
    (tokens,) = crops_of(model, inputs)
    assert len(tokens) == 1 + rows * columns
    flat = tokens.flatten(0, 1)
    visual = torch.cat([flat[:N], flat[mosaic(rows, columns).flatten()]])
    new = kept.sequences[0, inputs["input_ids"].shape[1] :]
    want = language(model, around(model, inputs, 0, visual), new)
    assert (logits(kept)[0] - want).abs().max() < 1e-4
    assert trace.audits[0].visual_tokens == (len(flat),)


@pytest.mark.parametrize(("budget", "each"), [(12, 3), (15, 3), ("3/tile", 3), ("25%", 4)])
def test_shares_of_the_layout_of_crops_are_rounded_down(crops, budget, each):
    model, inputs = crops[0], encode(crops[1], 2)  # of five and of four crops
    with inject(model, build("fastervlm"), budget, layout="crops") as trace:
        model.generate(**inputs, **STEPS)
    for audit, count in zip(trace.audits, (5, 4), strict=True):
        kept = torch.tensor(audit.kept_indices[0])
        share = 12 // count if budget == 12 else 15 // count if budget == 15 else each
        assert torch.bincount(kept // N, minlength=count).tolist() == [share] * count


def test_prompts_of_several_images_of_unequal_crops_run(crops):
    model, inputs = crops
    prompt = Prompt("USER: <image>\n<image>\nboth? ASSISTANT:", [image(0), image(1)], "")
    batch = inputs(prompt)
    with inject(model, build("none"), "full", layout="crops") as trace:
        model.generate(**batch, **STEPS)
    assert trace.audits[0].visual_tokens == (5 * N, 4 * N)


def test_the_fixed_layout_needs_the_mosaic_among_the_checkpoints():
    config = tiny("llava_next")
    config.image_grid_pinpoints = [[56, 112], [112, 56]]
    with pytest.raises(ValueError, match="needs the mosaic of 112 x 112 pixels"):
        Inputs(random_processor(config), config, layout="fixed2880")


def test_kept_tokens_stand_in_the_raster_of_the_mosaic(fixed):
    model, inputs = fixed[0], encode(fixed[1], 1)
    rows = ((3, 15), (5, 6), (0, 4), (2, 7), (1, 9))
    with inject(model, Fixed(rows), 10, layout="fixed2880") as trace:
        kept = model.generate(**inputs, **STEPS)
    (crops,) = crops_of(model, inputs)
    chosen = {N * crop + index for crop, row in enumerate(rows) if crop for index in row}
    numbers = [3, 15] + [number for number in mosaic().flatten().tolist() if number in chosen]
    assert trace.audits[0].kept_indices == (tuple(numbers),)
    visual = crops.flatten(0, 1)[numbers]
    want = language(
        model, around(model, inputs, 0, visual), kept.sequences[0, inputs["input_ids"].shape[1] :]
    )
    assert (logits(kept)[0] - want).abs().max() < 1e-4


def test_anyres_drops_padding_and_newlines_of_empty_rows(anyres):
    model = anyres[0]
    inputs = encode(
        anyres[1], 1, first=1
    )  # 60 x 150, which fills no pinpoint: its sides are padding
    (crops,) = crops_of(model, inputs)
    with inject(model, Fixed(((0, 5),) * len(crops)), 2 * len(crops)) as trace:
        kept = model.generate(**inputs, **STEPS)
    features = model.model.get_image_features(
        inputs["pixel_values"], inputs["image_sizes"]
    ).pooler_output[0]
    newline, tokens = model.model.image_newline, crops.flatten(0, 1)
    # every packed row that holds one of the chosen tokens, found by value
    chosen = torch.cat([tokens[crop * N + torch.tensor([0, 5])] for crop in range(1, len(crops))])
    want, line = [tokens[0], tokens[5]], []
    for feature in features[N:]:
        if torch.equal(feature, newline):
            want += [*line, newline] if line else []
            line = []
        elif bool((chosen == feature).all(1).any()):
            line.append(feature)
    assert trace.audits[0].kept_tokens == (len(want),)
    assert len(want) < len(chosen) + 2 + len(features)
    logits_of = language(
        model,
        around(model, inputs, 0, torch.stack(want)),
        kept.sequences[0, inputs["input_ids"].shape[1] :],
    )
    assert (logits(kept)[0] - logits_of).abs().max() < 1e-4


@dataclass(frozen=True)
class Means(Pruner):
    """Two tokens of every crop in their places, and the mean of the crop, which has none."""

    picks: tuple[int, int] = (9, 2)
    centre: int = 0

    name = "means"
    paper = "-"
    status = "baseline"
    merges = True

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        indices = torch.tensor([*self.picks, self.centre]).expand(tokens.shape[0], -1)
        mean = tokens.features.mean(1, keepdim=True)
        features = torch.cat([tokens.features[:, list(self.picks)], mean], 1)
        return Selection(indices, features, custom_order=True, unplaced=1)


def test_means_come_after_all_tiles_in_the_order_of_the_crops(fixed):
    model, inputs = fixed[0], encode(fixed[1], 1)
    with inject(model, Means(), 15, layout="fixed2880") as trace:
        kept = model.generate(**inputs, **STEPS)
    (crops,) = crops_of(model, inputs)
    chosen = [number for number in mosaic().flatten().tolist() if number % N in (9, 2)]
    means = [N * crop for crop in range(1, 5)]
    assert trace.audits[0].kept_indices == ((9, 2, 0, *chosen, *means),)
    tokens = crops.flatten(0, 1)
    visual = torch.cat([tokens[[9, 2]], crops[:1].mean(1), tokens[chosen], crops[1:].mean(1)])
    want = language(
        model, around(model, inputs, 0, visual), kept.sequences[0, inputs["input_ids"].shape[1] :]
    )
    assert (logits(kept)[0] - want).abs().max() < 1e-4


@pytest.mark.parametrize("first", [0, 1])
def test_means_are_not_lost_with_padding(anyres, first):
    model, inputs = anyres[0], encode(anyres[1], 1, first)
    (crops,) = crops_of(model, inputs)
    whole = trace_of(model, inputs, build("none"), "full")
    assert N not in whole, "the first token of the first tile is padding"
    numbers = trace_of(model, inputs, Means(), 3 * len(crops))
    means = [N * crop for crop in range(1, len(crops))]
    assert numbers[:3] == (9, 2, 0)
    assert list(numbers[-len(means) :]) == means


def trace_of(model, inputs, pruner, budget, layout=None):
    with inject(model, pruner, budget, layout=layout) as trace:
        trace.announce([Sample("a", (7, 8, 9), "what is this?")])
        model.generate(**inputs, **STEPS)
    return trace.audits[0].kept_indices[0]


@pytest.mark.parametrize("first", [0, 1])
def test_visionzips_contextual_tokens_come_last(any_layout, first):
    model, inputs = any_layout[0], encode(any_layout[1], 1, first)
    pruner = build("visionzip", contextual=2)
    with inject(model, pruner, "8/tile", layout=any_layout[1].layout) as trace:
        model.generate(**inputs, **STEPS)
    (audit,) = trace.audits
    count, numbers = len(audit.crops), audit.kept_indices[0]
    tiles, cls, contextual = (
        numbers[8 : -3 * (count - 1)],
        numbers[-3 * (count - 1) : -2 * (count - 1)],
        numbers[-2 * (count - 1) :],
    )
    assert numbers[0] == -1, "the base crop's CLS token"
    assert set(cls) == {-1}
    assert [number // N for number in contextual] == [c for c in range(1, count) for _ in "ab"]
    assert all(number >= N or number < 0 for number in tiles)


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize(
    ("method", "options", "keep"),
    [
        ("prumerge", {}, 6),
        ("prumerge_plus", {}, 6),
        ("fsr", {"relevance_space": "none"}, 6),
        ("sppruner", {"relevance_space": "llm_embed"}, 6),
        ("pooling", {}, 4),
        ("visionzip", {"contextual": 2}, 6),
    ],
)
def test_merged_tokens_stand_in_the_raster_or_last_and_none_is_lost(
    monkeypatch, any_layout, method, options, keep, first
):
    """The order, read from the selection token by token; images pad different sides."""
    model, inputs = any_layout[0], any_layout[1]
    pruner, seen = build(method, **options), []
    assert pruner.merges
    plain = type(pruner).select

    def select(self, tokens, keep):
        seen.append(plain(self, tokens, keep))
        return seen[-1]

    monkeypatch.setattr(type(pruner), "select", select)
    whole, line = [], []  # placeholders: token, and row of the mosaic
    for number in trace_of(model, encode(inputs, 1, first), build("none"), "full", inputs.layout):
        whole.append(number)
        line.append(whole.count(NEWLINE) - (number == NEWLINE))
    numbers = trace_of(model, encode(inputs, 1, first), pruner, f"{keep}/tile", inputs.layout)
    (selection,) = seen
    base, *tiles = selection.indices.tolist()
    placed, leading, last = [], [], []
    for crop, row in enumerate(tiles, start=1):
        for place, index in enumerate(row):
            number = EXTRA if index == EXTRA else crop * N + index
            if index == EXTRA and all(other == EXTRA for other in row[:place]):
                leading.append(number)
            elif index == EXTRA or place >= len(row) - selection.unplaced:
                last.append(number)
            elif number not in whole:  # padding
                last += [number] * (not selection.unplaced)
            else:
                placed.append(whole.index(number))
    if inputs.layout == "anyres":
        held = {line[place] for place in placed}
        newlines = [place for place, number in enumerate(whole) if number == NEWLINE]
        placed += [place for place in newlines if line[place] in held and place >= N]
    tail = [*leading, *last]
    assert numbers == (*base, *(whole[place] for place in sorted(placed)), *tail)


def test_divprune_ranks_the_packed_sequence(anyres, fixed):
    for (model, inputs), places in ((anyres, None), (fixed, 5 * N)):
        batch = encode(inputs, 1)
        with inject(model, build("divprune"), 12, layout=inputs.layout) as trace:
            kept = model.generate(**batch, **STEPS)
        (record,) = trace.audits
        assert record.kept_tokens == (12,)
        if places:
            packed = crops_of(model, batch)[0].flatten(0, 1)[
                list(range(N)) + mosaic().flatten().tolist()
            ]
        else:
            packed = model.model.get_image_features(
                batch["pixel_values"], batch["image_sizes"]
            ).pooler_output[0]
        index = build("divprune").prune(VisualTokens(packed[None].detach()), 12).indices[0]
        new = kept.sequences[0, batch["input_ids"].shape[1] :]
        want = language(model, around(model, batch, 0, packed[index]), new)
        assert (logits(kept)[0] - want).abs().max() < 1e-4


@dataclass(frozen=True)
class Shown(CDPruner):
    """CDPruner, which scales relevance over all crops of an image, and what it was shown."""

    seen: list = field(default_factory=list)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        self.seen.append((tokens, keep))
        return super().select(tokens, keep)


@pytest.mark.parametrize(("budget", "keeps"), [(12, [2, 3]), (10, [2]), ("25%/tile", [4])])
def test_the_crops_of_an_image_are_pruned_together(fixed, budget, keeps):
    model, inputs = fixed
    pruner = Shown(relevance_space="llm_embed")
    with inject(model, pruner, budget, layout="fixed2880") as trace:
        trace.announce([Sample("a", (7, 8, 9)), Sample("b", (5,))])
        model.generate(**encode(inputs, 2), max_new_tokens=1)
    assert [(tokens.shape, keep) for tokens, keep in pruner.seen] == [
        ((10, N), keep) for keep in keeps
    ]
    expected = {}
    for tokens, keep in pruner.seen:
        assert tokens.image_of_row == (0,) * 5 + (1,) * 5
        indices = (
            build("cdpruner", relevance_space="llm_embed")
            .prune(tokens, keep)
            .indices.view(2, 5, keep)
        )
        expected[keep] = indices + N * torch.arange(5)[:, None]
    for record, number in zip(trace.audits, range(2), strict=True):
        each = [3, 3, 2, 2, 2] if budget == 12 else keeps * 5
        want = torch.cat([expected[keep][number, crop] for crop, keep in enumerate(each)])
        assert sorted(record.kept_indices[0]) == want.tolist()


def test_an_image_is_pruned_with_its_own_budgets_only(anyres):
    """Of five, four and five crops: 16 tokens are 4 of each of four, and 4 or 3 of five."""
    model, inputs = anyres
    pruner = Shown(relevance_space="llm_embed")
    with inject(model, pruner, 16) as trace:
        trace.announce([Sample(name, (7,)) for name in "abc"])
        model.generate(**encode(inputs, 3), max_new_tokens=1)
    assert [len(record.crops) for record in trace.audits] == [5, 4, 5]
    shown = [(keep, tokens.image_of_row) for tokens, keep in pruner.seen]
    first, second, third = (0,) * 5, (1,) * 4, (2,) * 5
    assert shown == [(3, first + third), (4, first + second + third)]


@pytest.mark.parametrize(
    ("budget", "each"),
    [(12, [3, 3, 2, 2, 2]), ("3/tile", [3] * 5), ("12.5%/tile", [2] * 5), (10, [2] * 5)],
)
def test_budgets_per_image_and_per_tile(fixed, budget, each):
    model, inputs = fixed
    with inject(model, build("fastervlm"), budget, layout="fixed2880") as trace:
        model.generate(**encode(inputs, 1), **STEPS)
    kept = torch.tensor(trace.audits[0].kept_indices[0])
    assert torch.bincount(kept // N, minlength=5).tolist() == each


def test_fewer_tokens_than_crops_are_refused(fixed):
    model, inputs = fixed
    with (
        pytest.raises(ValueError, match="5 crops"),
        inject(model, build("fastervlm"), 4, layout="fixed2880"),
    ):
        model.generate(**encode(inputs, 1), **STEPS)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", ["fixed2880", "crops"])
def test_layouts_without_newlines_need_inputs_without_padding(fixed, batch, layout):
    model, inputs = fixed
    given = inputs.processor(
        text=[TEXT.format("a")] * batch,
        images=[image(0)] * batch,
        padding=True,
        return_tensors="pt",
    )
    with (
        pytest.raises(ValueError, match=f"{layout}' needs inputs without padding"),
        inject(model, build("none"), "full", layout=layout),
    ):
        model.generate(**given, **STEPS)


def test_the_fixed_layout_refuses_inputs_of_other_crops(crops):
    model, inputs = crops[0], encode(crops[1], 1, first=1)
    with (
        pytest.raises(ValueError, match="needs images of 5 crops, but one has 4"),
        inject(model, build("none"), "full", layout="fixed2880"),
    ):
        model.generate(**inputs, **STEPS)


@pytest.mark.parametrize(
    ("method", "options", "budget"),
    [
        ("fastv", {"layer": 1}, "50%"),
        ("pyramiddrop", {"stages": (1, 2, 3)}, "50%"),
        ("dart", {"layer": 1, "image_pivots": 2, "text_pivots": 2}, "50%"),
        ("sparsevlm", {"stages": (1, 3), "kept": (40, 11), "positions": "original"}, "50%"),
    ],
)
def test_methods_inside_the_language_model_equal_the_reference(any_layout, method, options, budget):
    model, inputs = any_layout
    pruner, batch = build(method, **options), encode(inputs, 1)
    with inject(model, pruner, budget, layout=inputs.layout) as trace:
        pruned = model.generate(**batch, **STEPS)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    rows = prompts(eager, batch)
    if inputs.layout != "anyres":  # the first image has 2 x 2 tiles in both
        (crops,) = crops_of(model, batch)
        visual = torch.cat([crops[0], crops.flatten(0, 1)[mosaic().flatten()]])
        embeds = around(model, batch, 0, visual)
        start = int((batch["input_ids"][0] == model.config.image_token_id).nonzero()[0])
        place = torch.zeros(len(embeds), dtype=torch.bool)
        place[start : start + 5 * N] = True
        rows = [(embeds, place)]
    count = int(rows[0][1].sum())
    keep = count // 2 + count % 2
    want, _ = reference(
        eager, rows, pruner, keep, pruned.sequences[:, batch["input_ids"].shape[1] :]
    )
    assert (logits(pruned) - want).abs().max() < 1e-4
    assert trace.audits[0].visual_tokens == (count,)


def test_random_choices_differ_between_crops(fixed):
    model, inputs = fixed
    with inject(model, build("random"), 20, layout="fixed2880") as trace:
        trace.announce([Sample("pope/1")])
        model.generate(**encode(inputs, 1), **STEPS)
    kept = torch.tensor(trace.audits[0].kept_indices[0])
    crops = [tuple((kept[kept // N == crop] % N).tolist()) for crop in range(5)]
    assert len(set(crops)) > 1


def test_layouts_are_for_llava_next(anyres, model):
    with (
        pytest.raises(ValueError, match="not one of"),
        inject(anyres[0], build("none"), "full", layout="fixed576"),
    ):  # type: ignore[arg-type]
        pass
    with (
        pytest.raises(ValueError, match="one layout"),
        inject(model, build("none"), "full", layout="anyres"),
    ):
        pass
