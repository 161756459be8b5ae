"""Methods without recorded outputs: every option against a literal reading of its source."""

import dataclasses
from itertools import product

import pytest
import torch
from reference import literal
from synthetic import rows_of, visual_tokens
from test_inject import STEPS
from test_inject_next import encode, setting

from secateur.families.base import NEWLINE
from secateur.injection import inject
from secateur.pruners import PrunerError, Selection, VisualTokens, build
from secateur.pruners.base import EXTRA
from secateur.pruners.hired import HiRED

KINDS = ("gauss", "clusters")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bands", [None, 1, 4, 7, 60, 64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": "score"},
        {"rank": "score", "variance_weight": 1.0},
        {"variance_weight": 0.0},
        {"sharpness": 3.0},
    ],
    ids=str,
)
def test_holov(options: dict, bands: int | None, kind: str) -> None:
    renamed = {"weight" if key == "variance_weight" else key: v for key, v in options.items()}
    for seed, keep in enumerate((3, 10, 21, 50)):
        tokens = visual_tokens(2, (8, 8), seed=seed, width=96, heads=4, kind=kind)
        picked = build("holov", bands=bands, **options).prune(tokens, keep).indices
        spatial = build("holov", bands=bands, order="spatial", **options).prune(tokens, keep)
        for row in range(2):
            want = literal.holov(rows_of(tokens, [row]), keep, bands, **renamed)
            assert picked[row].tolist() == want
            assert spatial.indices[row].tolist() == sorted(want)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
def test_trim(similarity: str, kind: str) -> None:
    for seed, keep in enumerate((1, 2, 21, 60)):
        tokens = visual_tokens(1, (8, 8), seed=seed, width=32, kind=kind)
        want = literal.trim(tokens, keep, similarity)
        selection = build("trim", similarity=similarity).prune(tokens, keep)
        assert selection.indices[0].tolist() == want
        x = tokens.encoder_features[0]
        assert torch.equal(selection.features[0, :-1], x[want[:-1]])
        others = x[literal.rest(64, want)].mean(0)
        assert torch.allclose(selection.features[0, -1], others, atol=1e-5)
        alone = build("trim", similarity=similarity, aggregate=False).prune(tokens, keep)
        assert alone.indices[0].tolist() == literal.trim(tokens, keep + 1, similarity)[:-1]
        assert alone.features is None


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_trim_adaptive(similarity: str) -> None:
    tokens = visual_tokens(4, (8, 8), seed=5, width=16)
    pruner = build("trim", adaptive=True, similarity=similarity)
    selection = pruner.prune(tokens, 4)
    assert len(set(selection.counts.tolist())) > 1
    for row, count in enumerate(selection.counts.tolist()):
        want = literal.trim_adaptive(rows_of(tokens, [row]), similarity)
        assert selection.indices[row, :count].tolist() == want
        others = tokens.encoder_features[row][literal.rest(64, want)].mean(0)
        assert torch.allclose(selection.features[row, count - 1], others, atol=1e-5)
    crops = dataclasses.replace(tokens, image_of_row=(0, 0, 0, 1))
    together = pruner.prune(crops, 4).counts.tolist()
    assert together[:3] == [together[0]] * 3
    assert together[3] == selection.counts[3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tiles", "grid"), [(4, (8, 8)), (3, (6, 6)), (2, (6, 6)), (4, (4, 6))])
@pytest.mark.parametrize(
    ("content", "regions"), product(["count", "attention"], ["strips", "tiles"])
)
def test_hired_on_crops(
    content: str, regions: str, tiles: int, grid: tuple[int, int], kind: str
) -> None:
    pruner = build("hired", content=content, regions=regions)
    for seed, keep in enumerate((1, 5, 12, 20)):
        tokens = visual_tokens(tiles + 2, grid, seed=seed, heads=4, kind=kind)
        tokens = dataclasses.replace(tokens, image_of_row=(0,) * (tiles + 1) + (1,))
        if regions == "tiles" and tiles != 4:
            with pytest.raises(PrunerError, match=f"needs four tiles, and this image has {tiles}"):
                pruner.prune(tokens, keep)
            continue
        selection = pruner.prune(tokens, keep)
        rows = [
            row[:count]
            for row, count in zip(
                selection.indices.tolist(), selection.counts.tolist(), strict=True
            )
        ]
        crops = rows_of(tokens, list(range(tiles + 1)))
        assert rows[:-1] == literal.hired_crops(crops, keep, content, regions)
        assert rows[-1] == literal.hired(rows_of(tokens, [tiles + 1]), keep)
        # shares are rounded down, but a crop keeps at least one token
        assert sum(map(len, rows[:-1])) <= max(keep, 2) * (tiles + 1)


def test_hired_without_crops_is_fastervlm() -> None:
    tokens = visual_tokens(3, (8, 8), seed=2, heads=4)
    ours = build("hired").prune(tokens, 20)
    assert ours.counts is None
    assert torch.equal(ours.indices, build("fastervlm").prune(tokens, 20).indices)


@pytest.mark.parametrize("alpha", [0, 1])
def test_hired_keeps_a_token_of_every_crop(alpha: float) -> None:
    tokens = visual_tokens(5, (4, 4), seed=1)
    crops = dataclasses.replace(tokens, image_of_row=(0,) * 5)
    whole = build("hired", alpha=alpha).prune(crops, 3).counts.tolist()
    assert whole[0] == (1, 15)[alpha]
    assert min(whole) == 1 if alpha else sum(whole[1:]) > 11


def test_mean_of_a_trimmed_image_has_no_place() -> None:
    tokens = visual_tokens(1, (4, 4))
    assert build("trim").prune(tokens, 1).indices.tolist() == [[EXTRA]]


@pytest.mark.parametrize("layout", ["anyres", "fixed2880"])
def test_hired_on_llava_next(layout: str) -> None:
    """Crops with budgets of their own: each keeps its share, less what lies in padding."""
    model, prepare = setting(layout, "sdpa")
    inputs = encode(prepare, 3)
    seen: list[VisualTokens] = []

    class Watched(HiRED):
        def select(self, tokens: VisualTokens, keep: int) -> Selection:
            seen.append(tokens)
            return super().select(tokens, keep)

    with inject(model, Watched(), "4/tile", layout=layout) as trace:
        model.generate(**inputs, **STEPS)
    (tokens,) = seen  # the crops of all images at once
    for image, audit in enumerate(trace.audits):
        assert tokens.image_of_row is not None
        rows = [row for row, owner in enumerate(tokens.image_of_row) if owner == image]
        want = literal.hired_crops(rows_of(tokens, rows), 4)
        numbers = {16 * crop + i for crop, kept in enumerate(want) for i in kept}
        held = {number for number in audit.kept_indices[0] if number != NEWLINE}
        assert held <= numbers
        assert held == numbers or layout == "anyres"
        assert len({len(kept) for kept in want}) > 1
