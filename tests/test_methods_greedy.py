"""The worked examples of the method specifications, and the edges where released code breaks."""

import dataclasses

import pytest
import torch
from torch import Tensor

from secateur.pruners import PrunerError, Selection, VisualTokens, build
from secateur.pruners.groups import k_means_groups, random_groups, suppress
from secateur.pruners.linalg import (
    cosine_gram,
    evenly_spaced,
    facility_location,
    farthest_point,
    greedy_map,
    largest_remainder,
    principal_axes,
    symmetric_gram,
)

VISUAL = torch.tensor(
    [[1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.9, 0.2], [0, 0, 1], [0.6, 0.6, 0]]
)
TEXT = torch.tensor([[1, 0.2, 0], [0.8, 0, 0.2]])
GRID_VISUAL = torch.cat([VISUAL, torch.tensor([[0, 0.1, 1], [0.5, 0, 0.5], [0.2, 0.9, 0.4]])])
GRID_SALIENCY = torch.tensor([0.30, 0.06, 0.20, 0.12, 0.10, 0.05, 0.14, 0.03, 0])
GRID_RELEVANCE = torch.tensor([0.1, 0.2, 0, 0.3, 0.5, 0.1, 0, 0.2, 0.4])
SUBJECTS = VisualTokens(
    features=GRID_VISUAL[None],
    encoder_features=GRID_VISUAL[None],
    grid=(3, 3),
    saliency=GRID_SALIENCY[None, None],
    relevance=GRID_RELEVANCE[None],
)
ASKED = VisualTokens(features=VISUAL[None], text_embeddings=TEXT[None])


def kept(selection: Selection, row: int = 0) -> list[int]:
    return selection.indices[row].tolist()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- PromPrune ------------------------------------------------------------------------------------

PROMINENT = VisualTokens(
    features=torch.tensor([[2.0, 0, 0], [0, 3, 0], [0, 0, 1], [1, 1, 0], [4, 0, 1], [1, 0, 3]])[
        None
    ],
    saliency=torch.tensor([0.30, 0.05, 0.10, 0.25, 0.20, 0.10])[None, None],
)


def test_promprune_worked_example():
    selection = build("promprune", mu=0.685, order="official").prune(PROMINENT, 4)
    assert kept(selection) == [0, 3, 2, 1]
    assert selection.diagnostics["T_sal"].tolist() == [2]
    torch.testing.assert_close(
        selection.diagnostics["entropy"], torch.tensor([0.685238]), atol=1e-5, rtol=0
    )
    assert kept(build("promprune", mu=0.685).prune(PROMINENT, 4)) == [0, 1, 2, 3]


def test_promprune_all_salient():
    assert kept(build("promprune", mu=2, order="official").prune(PROMINENT, 4)) == [0, 3, 4, 2]


def test_promprune_without_salient_tokens_starts_at_the_first():
    selection = build("promprune", mu=-2, order="official").prune(PROMINENT, 4)
    assert selection.diagnostics["T_sal"].tolist() == [0]
    assert kept(selection)[0] == 0


def test_promprune_at_exhausted_rank_repeats_nothing():
    tokens = VisualTokens(features=noise(2, 144, 16), saliency=noise(2, 1, 144).softmax(-1))
    for mu in (-2, 0.9, 2):
        selection = build("promprune", mu=mu, order="official").prune(tokens, 100)
        assert all(len(set(row)) == 100 for row in selection.indices.tolist())


def test_promprune_shares_are_clamped():
    pruner = build("promprune", kr_min=0.7, kr_max=0.2)
    torch.testing.assert_close(
        pruner.saliency_ratio(torch.tensor([0.0, 1.0])), torch.tensor([0.7, 0.7])
    )


def test_promprune_rows_may_split_differently():
    features = torch.cat([noise(1, 64, 32), noise(1, 64, 4) @ noise(4, 32, seed=1)])
    tokens = VisualTokens(features=features, saliency=noise(2, 1, 64, seed=2).softmax(-1))
    selection = build("promprune", mu=0.6, order="official").prune(tokens, 16)
    few, many = selection.diagnostics["T_sal"].tolist()
    assert few < many
    for row in range(2):
        alone = VisualTokens(
            features=features[row : row + 1], saliency=tokens.saliency[row : row + 1]
        )
        assert kept(build("promprune", mu=0.6, order="official").prune(alone, 16)) == kept(
            selection, row
        )


# --- PruneSID -------------------------------------------------------------------------------------

GROUPED = torch.tensor(
    [
        [1, 0],
        [0.98, 0.2],
        [0.6, 0.8],
        [0, 1],
        [-0.6, 0.8],
        [0.7, 0.7],
        [-1, 0.1],
        [0.2, -1],
        [0.1, 0.99],
        [0.9, -0.4],
    ]
)[None]
GROUPS = torch.tensor([0, 0, 0, 1, 1, 0, 1, 0, 1, 0])
MEMBERS = torch.eye(2)[GROUPS][None]
ATTENTION = torch.tensor([0.9, 0.8, 0.1, 0.5, 0.4, 0.3, 0.2, 0.15, 0.45, 0.6])[None, None]


def test_prunesid_worked_example():
    result = build("prunesid").allocate(GROUPED, MEMBERS, ATTENTION, 8)
    torch.testing.assert_close(result.redundancy, torch.tensor([0.0973135]), atol=1e-6, rtol=0)
    assert result.survivors.tolist() == [[1, 1]]
    assert result.quota.tolist() == [[3, 4]]
    assert result.picks.tolist() == [[0, 1, 9, 3, 8, 4, 6]]


@pytest.mark.parametrize(
    ("factor", "survivors"), [(0.25, [0, 3]), (2, [0, 3, 6]), (4, [0, 3, 6, 7])]
)
def test_prunesid_suppression(factor: float, survivors: list[int]):
    rank = ATTENTION[:, 0].argsort(descending=True).argsort()
    kept = suppress(
        cosine_gram(GROUPED),
        GROUPS[None],
        rank,
        torch.tensor([0.0973135 * factor]),
        ATTENTION[:, 0] > 0,
    )
    assert kept[0].nonzero()[:, 0].tolist() == survivors


def crops(batch: int = 2, count: int = 64, width: int = 32) -> VisualTokens:
    x = noise(batch, count, width)
    return VisualTokens(
        features=x,
        encoder_features=x,
        cls_token=noise(batch, width, seed=1),
        saliency=noise(batch, 2, count).softmax(-1),
    )


def alone(tokens: VisualTokens, row: int) -> VisualTokens:
    own = {name: t[row : row + 1] for name, t in tokens.tensors().items()}
    return dataclasses.replace(tokens, **own, sample_ids=tokens.sample_ids[row : row + 1])


def test_prunesid_counts_the_cls_token():
    tokens = crops()
    selection = build("prunesid").prune(tokens, 16)
    assert selection.indices.shape == (2, 16)
    assert selection.indices[:, 0].tolist() == [-1, -1]
    torch.testing.assert_close(selection.features[:, 0], tokens.cls_token)
    torch.testing.assert_close(
        selection.features[0, 1:], tokens.encoder_features[0, selection.indices[0, 1:]]
    )
    assert build("prunesid", keep_cls=False).prune(tokens, 16).features is None


@pytest.mark.parametrize(
    "options",
    [{}, {"variant": "qwen"}, {"quotas": "proportional"}, {"pca": "exact"}, {"centring": "tokens"}],
)
def test_prunesid_meets_every_budget(options: dict):
    for keep in (1, 2, 3, 4, 5, 17, 40, 63):
        assert build("prunesid", **options).prune(crops(), keep).indices.shape == (2, keep)


def test_prunesid_without_suppression_takes_the_first_of_each_group():
    result = build("prunesid", nms=False).allocate(GROUPED, MEMBERS, ATTENTION, 8)
    assert result.survivors.tolist() == [[6, 4]]
    # other = 5 of 7, in steps of 6 / 10 and 4 / 10: 3 and 2, and one for each group
    assert result.quota.tolist() == [[4, 3]]
    assert result.picks.tolist() == [[0, 1, 9, 5, 3, 8, 4]]


def test_prunesid_with_the_least_important_first():
    result = build("prunesid", least_first=True).allocate(GROUPED, MEMBERS, ATTENTION, 8)
    # group 0: token 2 suppresses 5, 9, 1 and 0, not 7; group 1: token 6 suppresses 4 and 3, not 8
    assert result.survivors.tolist() == [[2, 2]]
    assert result.picks.tolist() == [[2, 7, 5, 6, 8, 4, 3]]


@pytest.mark.parametrize(("alpha", "survivors"), [(32.0, [1, 1]), (4.0, [1, 2]), (2.0, [2, 2])])
def test_prunesid_alpha_divides_the_budget_in_the_threshold(alpha: float, survivors: list[int]):
    # at a budget of 8 the factors of rho are 1 / 4, 2 and 4, as in the examples of suppression
    result = build("prunesid", alpha=alpha).allocate(GROUPED, MEMBERS, ATTENTION, 8)
    assert result.survivors.tolist() == [survivors]


def test_prunesid_alpha_of_the_qwen_path():
    result = build("prunesid", variant="qwen", score="attention", alpha=14.4)
    same = build("prunesid", score="attention", keep_cls=False)
    # 576 / 14.4 * 8 / 10 = 32 times rho, which leaves every token
    assert result.allocate(GROUPED, MEMBERS, ATTENTION, 8).survivors.tolist() == [[6, 4]]
    assert same.allocate(GROUPED, MEMBERS, ATTENTION, 8).survivors.tolist() == [[1, 1]]


def test_prunesid_score_by_norm():
    x = GROUPED * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10])[:, None]
    pruner = build("prunesid", grouping="random", score="norm", nms=False)
    assert "saliency" not in pruner.needs
    assert pruner.allocate(x, MEMBERS, None, 8).picks.tolist() == [[9, 7, 5, 2, 8, 6, 4]]


def test_random_groups_have_one_size_and_differ_between_images():
    tokens = dataclasses.replace(crops(), sample_ids=("one|0", "two|0"))
    group = random_groups(tokens, 5, seed=0).argmax(2)
    assert [row.bincount().sort().values.tolist() for row in group] == [[12, 13, 13, 13, 13]] * 2
    assert not torch.equal(group[0], group[1])
    assert torch.equal(group[1:], random_groups(alone(tokens, 1), 5, seed=0).argmax(2))
    assert not torch.equal(group, random_groups(tokens, 5, seed=1).argmax(2))


def test_k_means_ends_where_every_token_is_in_the_group_of_its_nearest_mean():
    x = noise(2, 64, 32)
    member = k_means_groups(x, 6, seed=0)
    own = member.transpose(1, 2) @ x / member.sum(1)[..., None]
    assert torch.equal(torch.cdist(x, own).argmin(2), member.argmax(2))


@pytest.mark.parametrize("grouping", ["psca", "kmeans", "random"])
def test_prunesid_number_of_groups(grouping: str):
    pruner = build("prunesid", grouping=grouping, groups=15)
    assert pruner.prune(crops(), 16).indices.shape == (2, 16)
    with pytest.raises(
        PrunerError,
        match="groups=15: a budget of 15 of 64 tokens of width 32 has room for 14 groups at most",
    ):
        pruner.prune(crops(), 15)


def test_prunesid_has_no_more_components_than_channels():
    with pytest.raises(PrunerError, match=r"groups=33: .* room for 32 groups at most"):
        build("prunesid", groups=33).prune(crops(), 40)
    assert build("prunesid", groups=33, grouping="kmeans").prune(crops(), 40).indices.shape[1] == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grouping": "random", "score": "loading"}, "score=loading is the loading on a component"),
        ({"grouping": "kmeans", "variant": "qwen"}, "score=official is .* use score=attention or"),
        ({"grouping": "kmeans", "pca": "exact"}, "pca=exact has no effect with grouping=kmeans"),
        ({"grouping": "random", "centring": "tokens"}, "centring=tokens has no effect with"),
        ({"nms": False, "alpha": 24}, "alpha=24.0 has no effect with nms=false; leave it out"),
    ],
)
def test_prunesid_refuses_fields_that_do_not_go_together(options: dict, message: str):
    with pytest.raises(PrunerError, match=message):
        build("prunesid", **options)


def test_prunesid_dyn_groups_each_image_as_alone():
    tokens = dataclasses.replace(crops(), sample_ids=("one|0", "two|0"))
    pruner = build("prunesid_dyn", grouping="random", mean_phi=0.9)
    together = pruner.prune(tokens, 24)
    for row in range(2):
        own = pruner.prune(alone(tokens, row), 24)
        assert kept(together, row)[: own.indices.shape[1]] == kept(own)


def test_prunesid_with_attention_on_nothing():
    tokens = dataclasses.replace(crops(), saliency=torch.zeros(2, 2, 64))
    assert build("prunesid").prune(tokens, 16).indices.shape == (2, 16)


def test_prunesid_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = kept(build("prunesid").prune(crops(), 16))
    assert torch.equal(torch.rand(1), expected)
    assert first == kept(build("prunesid").prune(crops(), 16))


def test_prunesid_qwen_official_order_depends_on_the_budget():
    tokens = VisualTokens(features=noise(1, 400, 64))
    pruner = build("prunesid", variant="qwen", order="official")
    assert pruner.prune(tokens, 150).custom_order
    assert not pruner.prune(tokens, 151).custom_order


def test_prunesid_dyn_gives_redundant_images_less():
    varied, alike = noise(1, 64, 32), noise(1, 1, 32, seed=3) + 2 * noise(1, 64, 32, seed=4)
    x = torch.cat([varied, alike])
    tokens = dataclasses.replace(crops(), features=x, encoder_features=x)
    first = build("prunesid_dyn").prune(tokens, 24)
    assert torch.equal(first.indices, build("prunesid").prune(tokens, 24).indices)
    selection = build("prunesid_dyn", mean_phi=float(first.diagnostics["phi"].mean())).prune(
        tokens, 24
    )
    more, less = selection.counts.tolist()
    assert more > 24 > less > 16
    assert more + less == 48
    alone = dataclasses.replace(tokens, **{name: t[:1] for name, t in tokens.tensors().items()})
    assert kept(selection)[:more] == kept(build("prunesid").prune(alone, more))


@pytest.mark.parametrize("mean_phi", [None, 0.8])
@pytest.mark.parametrize("image_of_row", [None, (0, 0), (0, 1)])
def test_prunesid_dyn_does_not_depend_on_the_call(
    mean_phi: float | None, image_of_row: tuple[int, int] | None
):
    x = torch.cat([noise(1, 64, 32), noise(1, 1, 32, seed=3) + 2 * noise(1, 64, 32, seed=4)])
    tokens = dataclasses.replace(crops(), features=x, encoder_features=x, image_of_row=image_of_row)
    pruner = build("prunesid_dyn", mean_phi=mean_phi)
    together = pruner.prune(tokens, 24)
    for row in range(2):
        own = {name: t[row : row + 1] for name, t in tokens.tensors().items()}
        alone = pruner.prune(dataclasses.replace(tokens, **own, image_of_row=None), 24)
        count = alone.indices.shape[1]
        assert kept(together, row)[:count] == kept(alone)
        assert together.counts is None or together.counts[row] == count


# --- ZSPAPrune, DivPrune, CDPruner, TrimTokenator -------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "picked"), [("maxmin", [1, 0, 4, 2]), ("mean", [1, 0, 4, 2]), ("minmin", [1, 0, 2, 3])]
)
def test_zspaprune_worked_example(rule: str, picked: list[int]):
    pruner = build("zspaprune", core_ratio=0.5, diversity_rule=rule, order="picked")
    scores = torch.tensor([[0.987878, 0.993958, 0.109764, 0.130962, 0.109764, 0.776151]])
    torch.testing.assert_close(pruner.relevance(ASKED), scores, atol=1e-6, rtol=0)
    assert kept(pruner.prune(ASKED, 4)) == picked


def test_zspaprune_core_ratio_bounds():
    assert kept(build("zspaprune", core_ratio=1, order="picked").prune(ASKED, 3)) == [1, 0, 5]
    assert kept(build("zspaprune", core_ratio=0, order="picked").prune(ASKED, 1)) == [1]


@pytest.mark.parametrize(
    "text",
    [{"text_embeddings": torch.zeros(1, 0, 3)}, {"text_mask": torch.zeros(1, 2, dtype=torch.bool)}],
)
def test_zspaprune_without_text_is_divprune(text: dict[str, Tensor]):
    silent = dataclasses.replace(ASKED, **text)
    assert kept(build("zspaprune", order="picked").prune(silent, 3)) == [4, 0, 2]


def test_divprune_worked_example():
    assert kept(build("divprune", order="picked").prune(ASKED, 3)) == [4, 0, 2]
    assert kept(build("divprune").prune(ASKED, 3)) == [0, 2, 4]


@pytest.mark.parametrize("name", ["divprune", "zspaprune", "trimtokenator"])
def test_duplicates_and_zero_tokens_are_picked_once(name: str):
    features = torch.cat([torch.ones(1, 5, 3), torch.zeros(1, 3, 3)], 1)
    tokens = VisualTokens(features=features, text_embeddings=TEXT[None])
    assert len(set(kept(build(name).prune(tokens, 7)))) == 7


CONDITIONED = VisualTokens(
    features=VISUAL[None],
    clip_patches=torch.tensor([[1, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8], [0, -1], [0.6, 0.8]])[None],
    clip_text=torch.tensor([[[0.0, 1.0]]]),
)


def test_cdpruner_worked_example():
    pruner = build("cdpruner", order="picked")
    expected = torch.tensor([[0.5, 0.2, 5e-7, 0.1, 1, 0.1]])
    torch.testing.assert_close(pruner.relevance(CONDITIONED), expected, atol=1e-6, rtol=0)
    assert kept(pruner.prune(CONDITIONED, 3)) == [4, 0, 3]


def test_cdpruner_at_exhausted_rank_goes_on_by_relevance():
    tokens = VisualTokens(
        features=torch.eye(2).repeat(3, 1)[None],
        clip_patches=torch.tensor(
            [[0.1, -0.9], [0.1, -0.5], [1.0, 0.2], [1.0, 0.1], [1.0, 0.4], [1.0, 0.3]]
        )[None],
        clip_text=torch.tensor([[[0.0, 1.0]]]),
    )
    assert kept(build("cdpruner", order="picked").prune(tokens, 5)) == [0, 1, 3, 2, 5]


def test_cdpruner_without_text_is_an_unconditioned_process():
    tokens = dataclasses.replace(CONDITIONED, clip_text=torch.zeros(1, 0, 2))
    assert build("cdpruner").relevance(tokens).tolist() == [[1.0] * 6]
    assert build("cdpruner").prune(tokens, 3).indices.shape == (1, 3)


def test_cdpruner_scales_relevance_over_the_crops_of_an_image():
    both = {name: t.repeat(2, *[1] * (t.dim() - 1)) for name, t in CONDITIONED.tensors().items()}
    both["clip_patches"][1, 4] = torch.tensor(
        [1.0, 0.0]
    )  # the second crop has no token as relevant
    apart = dataclasses.replace(CONDITIONED, **both)
    joint = dataclasses.replace(apart, image_of_row=(0, 0))
    pruner = build("cdpruner")
    assert pruner.relevance(apart)[1].max() > 1
    torch.testing.assert_close(pruner.relevance(joint)[1, 0], torch.tensor(0.5), atol=1e-5, rtol=0)


def test_trimtokenator_worked_example():
    assert kept(build("trimtokenator", survivors=0.84, order="picked").prune(ASKED, 3)) == [0, 3, 2]
    assert kept(build("trimtokenator", survivors=0.84).prune(ASKED, 3)) == [0, 2, 3]


def test_trimtokenator_without_text_looks_at_all_tokens():
    silent = dataclasses.replace(ASKED, text_mask=torch.zeros(1, 2, dtype=torch.bool))
    assert kept(build("trimtokenator").prune(silent, 6 - 1)) == kept(
        build("trimtokenator", survivors=1.0).prune(silent, 5)
    )
    assert 4 in kept(build("trimtokenator").prune(silent, 1))


# --- SPpruner and FSR -----------------------------------------------------------------------------


def test_sppruner_worked_example():
    pruner = build("sppruner", relevance_space="given")
    stages = pruner.stages(SUBJECTS, 4)
    expected = torch.tensor([[0.8, 0.38, 0.3333, 0.74, 1.0, 0.2167, 0.2333, 0.29, 0.4]])
    torch.testing.assert_close(stages.phi, expected, atol=1e-4, rtol=0)
    assert stages.focus.tolist() == [[4, 0]]
    assert stages.context.tolist() == [[2, 7]]
    assert sorted(zip(stages.merged[0].tolist(), stages.anchors[0].tolist(), strict=True)) == [
        (3, 2),
        (8, 2),
    ]
    selection = pruner.prune(SUBJECTS, 4)
    assert kept(selection) == [0, 2, 4, 7]
    expected = torch.stack(
        [GRID_VISUAL[0], torch.tensor([0.0543, 0.9226, 0.2090]), GRID_VISUAL[4], GRID_VISUAL[7]]
    )
    torch.testing.assert_close(selection.features[0], expected, atol=1e-4, rtol=0)


def test_sppruner_with_one_token_only_focuses():
    selection = build("sppruner", relevance_space="given").prune(SUBJECTS, 1)
    assert kept(selection) == [4]
    assert torch.equal(selection.features[0], GRID_VISUAL[4:5])


def test_sppruner_with_flat_saliency_goes_by_relevance():
    flat = dataclasses.replace(SUBJECTS, saliency=torch.zeros(1, 1, 9))
    assert build("sppruner", relevance_space="given").stages(flat, 4).focus.tolist() == [[4, 8]]


@pytest.mark.parametrize(
    "options",
    [
        {"interplay": 0.0},
        {"saliency_weight": 0.0},
        {"saliency_weight": 1.0},
        {"scan_weight": 0.0},
        {"focus_share": 0.25},
        {"focus_share": 0.75},
        {"focus_score": "product"},
        {"anchors": "grid"},
        {"saliency_norm": "rank"},
        {"merge": False},
    ],
)
def test_sppruner_ablations_keep_the_budget(options: dict):
    for keep in range(1, 9):
        selection = build("sppruner", relevance_space="given", **options).prune(SUBJECTS, keep)
        assert selection.indices.shape == (1, keep)
        assert (selection.features is None) == (options.get("merge") is False)


def test_sppruner_needs_follow_its_relevance():
    assert "text_embeddings" in build("sppruner", relevance_space="llm_embed").needs
    assert {"clip_patches", "clip_text"} <= build("sppruner").needs


def test_fsr_worked_example():
    pruner = build("fsr", relevance_space="given")
    stages = pruner.stages(SUBJECTS, 4)
    expected = torch.tensor([[0.008, 0.0128, 0, 0.0864, 0.3333, 0.0013, 0, 0.0064, 0]])
    torch.testing.assert_close(stages.phi, expected, atol=1e-4, rtol=0)
    assert stages.picks.tolist() == [[4, 3, 0, 7]]
    assert stages.focus_count.tolist() == [2]
    merges = [
        pair
        for pair in zip(stages.merged[0].tolist(), stages.anchors[0].tolist(), strict=True)
        if pair[0] >= 0
    ]
    assert sorted(merges) == [(1, 0), (5, 0)]
    selection = pruner.prune(SUBJECTS, 4)
    assert kept(selection) == [0, 3, 4, 7]
    torch.testing.assert_close(
        selection.features[0, 0], torch.tensor([0.9181, 0.0940, 0]), atol=1e-4, rtol=0
    )


def test_fsr_without_relevance_or_scores():
    assert kept(build("fsr", relevance_space="none").prune(SUBJECTS, 1)) == [0]
    flat = dataclasses.replace(SUBJECTS, saliency=torch.ones(1, 1, 9))
    selection = build("fsr", relevance_space="given").prune(flat, 4)
    assert selection.diagnostics["focus"].tolist() == [1]
    assert selection.indices.shape == (1, 4)


# --- shared maths ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 127, 128, 129, 257, 514])
def test_gram_is_symmetric(count: int):
    x = noise(3, count, 8)
    gram = symmetric_gram(x)
    torch.testing.assert_close(gram, x @ x.transpose(1, 2), atol=1e-5, rtol=0)
    assert torch.equal(gram, gram.transpose(1, 2))


def test_cosines_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch):
    x = noise(3, 20, 8)
    together = cosine_gram(x)
    monkeypatch.setattr("secateur.pruners.linalg.CACHED", 1)  # one image at a time
    torch.testing.assert_close(cosine_gram(x), together)


@pytest.mark.parametrize(("batch", "count"), [(3, 60), (1, 600), (2, 600)])
def test_facility_location_is_the_greedy_rule(batch: int, count: int):
    x = noise(batch, count, 8)
    similarity, weights = x @ x.transpose(1, 2), noise(batch, count, seed=1).exp()
    for row in range(batch):
        cover, picks = torch.zeros(count, dtype=torch.float64), []
        for _ in range(30):
            gain = (similarity[row].double() - cover[:, None]).clamp_min(0).sum(0) * weights[row]
            gain[picks] = -torch.inf
            picks.append(int(gain.argmax()))
            cover = torch.maximum(cover, similarity[row, picks[-1]].double())
        assert facility_location(similarity, weights, 30)[row].tolist() == picks


def test_greedy_map_maximises_the_determinant_step_by_step():
    x = noise(2, 12, 8).double()
    kernel = x @ x.transpose(1, 2)
    order = greedy_map(kernel, 5)
    for row in range(2):
        picks: list[int] = []
        for _ in range(5):
            volumes = [
                float(kernel[row][[*picks, i]][:, [*picks, i]].det()) if i not in picks else -1.0
                for i in range(12)
            ]
            picks.append(volumes.index(max(volumes)))
        assert order[row].tolist() == picks


def test_farthest_point_prefers_the_lower_index():
    distance = 1 - torch.eye(5)[None]
    assert farthest_point(distance, torch.tensor([[2]]), 5).tolist() == [[2, 0, 1, 3, 4]]


def test_largest_remainder():
    share = torch.tensor([[0.5, 0.25, 0.25], [0.34, 0.33, 0.33]])
    assert largest_remainder(share, 7).tolist() == [[3, 2, 2], [3, 2, 2]]


def test_randomised_axes_match_torch():
    x = noise(2, 40, 60)
    for matrix in (x, x.transpose(1, 2)):
        torch.manual_seed(3)
        expected = torch.pca_lowrank(matrix, q=6, center=False)[2]
        torch.testing.assert_close(
            principal_axes(matrix, 6, seed=3).abs(), expected.abs(), atol=1e-4, rtol=0
        )


def test_exact_axes_are_singular_vectors():
    x = noise(2, 40, 20)
    expected = torch.linalg.svd(x).Vh[:, :4].transpose(1, 2)
    torch.testing.assert_close(principal_axes(x, 4).abs(), expected.abs(), atol=1e-4, rtol=0)


def test_evenly_spaced():
    assert evenly_spaced(10, 5).tolist() == [1, 3, 5, 7, 9]
    assert evenly_spaced(10, 0).tolist() == []
