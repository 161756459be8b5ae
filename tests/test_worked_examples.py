"""The small examples of the method descriptions, calculated by hand."""

import pytest
import torch

from secateur.pruners import LayerTokens, PrunerError, Selection, VisualTokens, build
from secateur.pruners.base import EXTRA
from secateur.pruners.linalg import top_k

# six tokens and a question of two, used by several methods
V = torch.tensor([[1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.9, 0.2], [0, 0, 1], [0.6, 0.6, 0]])


def close(a: torch.Tensor, b: list, atol: float = 1e-4) -> bool:
    return torch.allclose(a, torch.tensor(b), atol=atol)


def test_visionzip() -> None:
    saliency = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.1, 0.05]).expand(1, 2, 6)
    keys = torch.cat([torch.ones(1, 3), V]).repeat(1, 2)[None]  # two equal heads
    tokens = VisualTokens(
        V[None],
        encoder_features=V[None],
        cls_token=torch.zeros(1, 3),
        saliency=saliency,
        encoder_keys=keys,
    )
    selection = build("visionzip", contextual=2).prune(tokens, 5)
    assert selection.indices.tolist() == [[EXTRA, 0, 1, 2, 4]]
    assert close(selection.features[0, 3:], [[0.3, 1.75, 0.1], [0, 0, 1]])


@pytest.mark.parametrize(("budget", "contextual"), [(192, 30), (128, 20), (64, 10), (32, 5)])
def test_visionzip_contextual_share(budget: int, contextual: int) -> None:
    x = torch.randn(1, 576, 8, generator=torch.Generator().manual_seed(0))
    keys = torch.cat([x[:, :1], x], 1)
    tokens = VisualTokens(
        x,
        encoder_features=x,
        cls_token=x[:, 0],
        saliency=x.abs().mean(2)[:, None],
        encoder_keys=keys,
    )
    indices = build("visionzip").prune(tokens, budget).indices[0]
    assert (indices[1 : budget - contextual].diff() > 0).all()
    assert (indices[budget - contextual :].diff() > 0).all()
    assert indices[budget - contextual] < indices[budget - contextual - 1]


def test_vispruner() -> None:
    features = torch.cat([V, torch.tensor([[0, 0.1, 1], [0.5, 0, 0.5]])])[None]
    saliency = torch.tensor([[[0.30, 0.06, 0.20, 0.12, 0.10, 0.05, 0.14, 0.03]]])
    tokens = VisualTokens(features, encoder_features=features, saliency=saliency)
    picked = build("vispruner", important_ratio=1 / 3, order="picked").prune(tokens, 6)
    assert picked.indices.tolist() == [[0, 2, 6, 3, 1, 7]]


def test_prumerge() -> None:
    features = torch.tensor([[[1.0, 0], [0, 1], [1, 1], [2, 0]]])
    queries = torch.tensor([[[2.0, 0], [0, 0], [0, 0], [0, 0], [0, 0]]])
    keys = torch.tensor([[[0, 0], [2, 0], [0, 1], [1, 1], [1.5, 0.5]]])
    tokens = VisualTokens(features, encoder_features=features, last_queries=queries, last_keys=keys)
    pruner = build("prumerge", neighbours=2)
    assert close(pruner.attention(tokens), [[0.5393, 0.0319, 0.1311, 0.2659]])
    selection = pruner.prune(tokens, 3)
    assert selection.indices.tolist() == [[0, 3, EXTRA]]
    assert close(selection.features[0], [[1.6629, 0.1311], [2.6704, 0.1311], [0.1311, 0.1630]])


def test_prumerge_plus_fixed() -> None:
    attention = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.8, 0.4, 0.5, 0.6, 0.7, 0.0]])
    assert build("prumerge_plus").centres(attention, 5).tolist() == [[1, 4, 0, 3, 7]]


def test_prumerge_without_outliers_keeps_one_centre() -> None:
    x = torch.ones(1, 16, 4)
    tokens = VisualTokens(
        x, encoder_features=x, last_queries=torch.ones(1, 17, 4), last_keys=torch.ones(1, 17, 4)
    )
    selection = build("prumerge", adaptive=True).prune(tokens, 1)
    assert selection.counts.tolist() == [2]
    assert selection.indices.tolist() == [[0, EXTRA]]


def test_hiprune() -> None:
    tokens = VisualTokens(
        torch.zeros(1, 9, 1),
        grid=(3, 3),
        object_attention=torch.tensor([[0.30, 0.06, 0.20, 0.12, 0.10, 0.05, 0.14, 0.03, 0]]),
        output_attention=torch.tensor([[0.1, 0.2, 0.05, 0.3, 0.02, 0.15, 0.08, 0.06, 0.04]]),
    )
    assert build("hiprune", alpha=0.5, order="picked").prune(tokens, 6).indices.tolist() == [
        [0, 1, 3, 5, 6, 7]
    ]


def test_hired_shares_its_budget_by_the_whole_images_attention() -> None:
    # 5 crops of 2 x 2 tokens, 2 of each on average: 10. The whole image gets half, at most its 4.
    # 6 remain for the tiles.
    first = torch.tensor([0.5, 0.1, 0.3, 0.1])
    tokens = VisualTokens(
        torch.zeros(5, 4, 1),
        grid=(2, 2),
        saliency=torch.tensor([0.1, 0.4, 0.2, 0.3]).expand(5, 2, 4),
        first_saliency=first.expand(5, 2, 4),
        image_of_row=(0,) * 5,
    )
    # its two most attended tokens lie in tiles 0 and 2: 3 each; a tile keeps at least one
    selection = build("hired").prune(tokens, 2)
    assert selection.counts.tolist() == [4, 3, 1, 3, 1]
    assert selection.indices[1].tolist() == [1, 2, 3, 0]  # the last place is padding
    # the sums of attention: 6 * 0.5, 6 * 0.1, 6 * 0.3, 6 * 0.1, rounded down
    by_sum = build("hired", content="attention").prune(tokens, 2)
    assert by_sum.counts.tolist() == [4, 3, 1, 1, 1]


def test_hired_regions() -> None:
    strips, tiles = build("hired"), build("hired", regions="tiles")
    assert strips.region(16, 4, (4, 4)).tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert tiles.region(16, 4, (4, 4)).tolist() == [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2
    assert strips.region(8, 3, (2, 4)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_holov() -> None:
    # two bands of two tokens. Within the first, cosines are 1: each token has the cosines 0
    # (itself) and 1, of mean 1 and variance 1. Within the second, all are 0.
    x = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])[None]
    tokens = VisualTokens(x, saliency=torch.tensor([[[0.3, 0.1, 0.5, 0.1]]]))
    # thousandfold attention of mean 200 and 300; the first band gains 0.09 * 200:
    # 3 * 218 / 518 = 1.3, 3 * 300 / 518 = 1.7; the third token goes to the larger
    assert build("holov", bands=2).prune(tokens, 3).indices.tolist() == [[0, 2, 3]]
    # with weight 1 they are 400 and 300
    heavy = build("holov", bands=2, variance_weight=1).prune(tokens, 3)
    assert heavy.indices.tolist() == [[0, 1, 2]]


def test_holov_of_a_band_that_is_full() -> None:
    x = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])[None]
    tokens = VisualTokens(x, saliency=torch.tensor([[[0.05, 0.9, 0.01, 0.02]]]))
    # 3 * 0.97 = 2.9: two and the rest, which has no room there
    assert build("holov", bands=2).prune(tokens, 3).indices.tolist() == [[0, 1, 3]]


def test_holov_ranks() -> None:
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1]])[None]
    tokens = VisualTokens(x, saliency=torch.tensor([[[0.3, 0.2, 0.4]]]))
    # variances 0.375, 0.375, 0, of mean 0.25; scaled to the mean attention 0.3: 0.45, 0.45, 0
    by_score = build("holov", bands=1, rank="score", variance_weight=1)
    assert by_score.prune(tokens, 1).indices.tolist() == [[0]]  # 0.75, 0.65, 0.4
    assert build("holov", bands=1).prune(tokens, 2).indices.tolist() == [[2, 0]]
    spatial = build("holov", bands=1, order="spatial")
    assert spatial.prune(tokens, 2).indices.tolist() == [[0, 2]]


@pytest.mark.parametrize(("budget", "bands"), [(192, 5), (128, 8), (64, 16)])
def test_holov_bands_of_the_tables(budget: int, bands: int) -> None:
    assert build("holov").number(576, budget) == bands


def test_trim() -> None:
    patches = torch.tensor([[1, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8], [0, -1], [0.6, 0.8]])
    tokens = VisualTokens(
        V[None],
        encoder_features=V[None],
        clip_patches=patches[None],
        clip_text=torch.tensor([[[0.0, 1]]]),
    )
    # products 0, 0.6, 1, 0.8, -1, 0.8: the smallest are nearest
    selection = build("trim").prune(tokens, 3)
    assert selection.indices.tolist() == [[0, 4, EXTRA]]
    assert close(selection.features[0, 2], [0.375, 0.65, 0.05])  # of tokens 1, 2, 3 and 5
    assert build("trim", aggregate=False).prune(tokens, 2).indices.tolist() == [[0, 4]]


def test_trim_by_product_or_cosine() -> None:
    tokens = VisualTokens(
        V[None, :3],
        encoder_features=V[None, :3],
        clip_patches=torch.tensor([[[0.0, -1], [4, -3], [1, 1]]]),  # cosines -1, -0.6, 0.7
        clip_text=torch.tensor([[[0.0, 2]]]),  # products -2, -6, 2
    )
    assert build("trim", aggregate=False).prune(tokens, 1).indices.tolist() == [[1]]
    by_cosine = build("trim", aggregate=False, similarity="cosine")
    assert by_cosine.prune(tokens, 1).indices.tolist() == [[0]]


def test_trim_by_outliers() -> None:
    # the softmax is 0.74 for one token and 0.04 for seven: both quartiles and the fence are 0.04
    patches = torch.zeros(1, 8, 2)
    patches[0, 5, 1] = -3
    tokens = VisualTokens(
        patches,
        encoder_features=torch.arange(8.0).view(1, 8, 1),
        clip_patches=patches,
        clip_text=torch.tensor([[[0.0, 1]]]),
    )
    selection = build("trim", adaptive=True).prune(tokens, 7)
    assert selection.counts.tolist() == [2]
    assert selection.indices.tolist() == [[5, EXTRA]]
    assert close(selection.features[0, :, 0], [5, 23 / 7])


def test_pooling() -> None:
    tokens = VisualTokens(torch.arange(16.0).view(1, 16, 1), grid=(2, 8))
    selection = build("pooling").prune(tokens, 4)
    assert selection.indices.tolist() == [[0, 2, 4, 6]]
    assert selection.features.flatten().tolist() == [4.5, 6.5, 8.5, 10.5]
    with pytest.raises(PrunerError, match="keeps 4 of 16 tokens and cannot keep 5"):
        build("pooling").prune(tokens, 5)
    with pytest.raises(PrunerError, match="both sides have to be even"):
        build("pooling").prune(VisualTokens(torch.zeros(1, 12, 1), grid=(3, 4)), 3)


def test_fastv() -> None:
    rows = torch.tensor([[0.1, 0.05, 0.3, 0.1, 0.2, 0.25], [0.1, 0.05, 0.1, 0.3, 0.2, 0.25]])
    tokens = LayerTokens(
        torch.arange(1, 5)[None],
        torch.tensor([[False] * 5 + [True]]),
        attention=rows[None, :, None],
    )
    kept = build("fastv").prune(tokens, 2).indices
    assert tokens.survivors(kept).tolist() == [[0, 2, 3, 5]]


def test_fastv_schedules() -> None:
    assert build("fastv", budget="after").schedule(576, 32, 192) == {2: 192}
    assert build("fastv").schedule(576, 32, 192) == {2: 166}  # (32 * 192 - 2 * 576) / 30 = 166.4
    with pytest.raises(PrunerError, match="cannot average 32 tokens"):
        build("fastv").schedule(576, 32, 32)


def test_dart() -> None:
    hidden = torch.cat([torch.ones(1, 3), V, torch.tensor([[1.0, 1, 1], [0, 0, 1]])])[None]
    keys = torch.tensor([[1.0, 1], [1, 2], [5, 1], [1, 1], [2, 2], [0, 1], [3, 3], [4, 0], [1, 0]])[
        None, None
    ]
    tokens = LayerTokens(
        torch.arange(1, 7)[None], torch.tensor([[False] * 7 + [True] * 2]), hidden=hidden, keys=keys
    )
    pruner = build("dart", image_pivots=1, text_pivots=1)
    image, text = pruner.pivots(tokens)
    assert (image.tolist(), text.tolist(), pruner.visit_order(image, text).tolist()) == (
        [[2]],
        [[7]],
        [[2, 7]],
    )
    assert tokens.visual.gather(1, pruner.prune(tokens, 4).indices).tolist() == [[1, 2, 3, 4, 5]]


@pytest.mark.parametrize(("budget", "kept"), [(192, 196), (128, 132), (64, 68)])
def test_dart_passes_more_than_its_budget(budget: int, kept: int) -> None:
    assert build("dart").tokens_after(576, budget) == kept


def test_pyramiddrop_of_the_paper() -> None:
    pruner = build("pyramiddrop", ratios=(0.5, 0.25, 0.125))
    assert pruner.schedule(576, 32, 270) == {8: 288, 16: 144, 24: 72}
    assert pruner.average(576, 32, 270) == 270
    with pytest.raises(PrunerError, match=r"average 270.0 tokens, which is not the budget of 192"):
        pruner.schedule(576, 32, 192)


@pytest.mark.parametrize(
    ("budget", "plan"),
    [(192, {8: 145, 16: 36, 24: 9}), (128, {4: 215, 8: 80, 12: 30}), (64, {2: 176, 4: 54, 6: 16})],
)
def test_pyramiddrop_at_equal_averages(budget: int, plan: dict) -> None:
    pruner = build("pyramiddrop")
    assert pruner.schedule(576, 32, budget) == plan
    assert budget - 1 < pruner.average(576, 32, budget) <= budget


# visual tokens after each stage, merged ones included
@pytest.mark.parametrize(
    ("tokens", "budget", "plan", "mean"),
    [
        (576, 192, {2: 300, 6: 200, 16: 110}, 191.0),
        (576, 128, {2: 303, 6: 110, 16: 36}, 126.25),
        (576, 64, {2: 66, 6: 30, 16: 17}, 62.125),
        (2880, 160, {1: 136, 6: 100, 16: 44}, 164.5),
        (2880, 640, {2: 960, 6: 600, 16: 300}, 637.5),
    ],
)
def test_pyramiddrop_of_scopes_code(
    tokens: int, budget: int, plan: dict[int, int], mean: float
) -> None:
    found = build("pyramiddrop", schedules="scope").schedule(tokens, 32, budget)
    assert found == plan
    layers = [next((n for s, n in [*plan.items()][::-1] if s <= i), tokens) for i in range(32)]
    assert sum(layers) / 32 == mean


@pytest.mark.parametrize(
    ("tokens", "layers", "budget"), [(576, 40, 192), (144, 32, 48), (576, 32, 96)]
)
def test_pyramiddrop_has_no_other_schedules_of_scope(tokens: int, layers: int, budget: int) -> None:
    with pytest.raises(
        PrunerError, match=f"none for {budget} of {tokens} tokens in {layers} layers"
    ):
        build("pyramiddrop", schedules="scope").schedule(tokens, layers, budget)
    with pytest.raises(PrunerError, match="stages and counts of its own"):
        build("pyramiddrop", schedules="scope", stages=(2, 6, 16))


@pytest.mark.parametrize(
    ("budget", "counts"),
    [(192, [309, 204, 113]), (128, [312, 117, 39]), (96, [249, 55, 27]), (64, [82, 32, 18])],
)
def test_sparsevlm_counts(budget: int, counts: list[int]) -> None:
    pruner, tokens, passed = build("sparsevlm"), 576, []
    for keep in pruner.schedule(576, 32, budget).values():
        tokens = pruner.tokens_after(tokens, keep)
        passed.append(tokens)
    assert passed == counts


def test_sparsevlm_average_of_192_is_above_it() -> None:
    assert round(build("sparsevlm").average(576, 32, 192)) == 206


def test_sparsevlm_raters() -> None:
    embeddings = torch.tensor([[[1.0, 0], [0, 1], [2, 0], [0, 0], [0, 1]]])
    text = torch.tensor([[False, False, True, True, True]])
    raters = build("sparsevlm").queries(embeddings, torch.tensor([[0, 1]]), text)
    assert raters.tolist() == [[False, False, True, False, True]]


def test_sparsevlm_merges_clusters() -> None:
    # two tight pairs far apart: two clusters, their means
    x = torch.tensor([[[0.0, 0], [0.1, 0], [9, 9], [9, 9.2]]])
    means = build("sparsevlm").cluster(x, 2)[0]
    assert close(means[means[:, 0].argsort()], [[0.05, 0], [9, 9.1]])


def test_scores_that_are_no_numbers_are_refused():
    saliency = torch.full((1, 2, 6), float("nan"))
    with pytest.raises(PrunerError, match="NaN scores"):
        Selection(top_k(saliency.mean(1), 3).sort(1).values).check("mine", 1, 6)
