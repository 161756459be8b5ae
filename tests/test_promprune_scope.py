"""The ablations of PromPrune and SCOPE against literal readings of their papers."""

import dataclasses
import math

import pytest
import torch
from synthetic import visual_tokens
from torch import Tensor

from secateur.pruners import PrunerError, Selection, VisualTokens, build


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picks(selection: Selection, row: int = 0) -> list[int]:
    return selection.indices[row].tolist()


def image(seed: int, count: int = 40, width: int = 24) -> VisualTokens:
    """One image of random tokens, which lie about a common direction."""
    features = noise(1, count, width, seed=seed) + noise(width, seed=seed + 1)
    return VisualTokens(
        features=features,
        encoder_features=features,
        saliency=(2 * noise(1, 2, count, seed=seed + 2)).softmax(-1),
    )


def salient_first(tokens: VisualTokens, count: int) -> tuple[list[int], list[int]]:
    """The `count` most salient tokens, and the others in ascending order."""
    assert tokens.saliency is not None
    ranking = tokens.saliency[0].mean(0).argsort(descending=True, stable=True).tolist()
    return ranking[:count], sorted(ranking[count:])


def cosines(tokens: VisualTokens) -> Tensor:
    unit = tokens.features[0] / tokens.features[0].norm(dim=1, keepdim=True)
    return unit @ unit.T


# --- PromPrune ------------------------------------------------------------------------------------


@pytest.mark.parametrize("salient", [0, 1, 5, 12])
@pytest.mark.parametrize("seed", range(4))
def test_stage2_by_farthest_point(seed: int, salient: int) -> None:
    """App. D.2; the first pick is that of the released code."""
    tokens = image(seed)
    first, others = salient_first(tokens, salient)
    cosine = cosines(tokens)
    start = min(others, key=lambda i: max(float(cosine[i, s]) for s in first)) if first else 0
    chosen = [start] if salient < 12 else []
    while len(chosen) < 12 - salient:
        left = [i for i in others if i not in chosen]
        chosen.append(max(left, key=lambda i: min(1 - float(cosine[i, j]) for j in chosen)))
    pruner = build("promprune", stage2="farthest_point", salient=salient, order="official")
    assert picks(pruner.prune(tokens, 12)) == first + chosen


@pytest.mark.parametrize("salient", [0, 1, 5, 12])
@pytest.mark.parametrize("seed", range(4))
def test_stage2_by_facility_location(seed: int, salient: int) -> None:
    """App. D.2, with weights of 1."""
    tokens = image(seed)
    first, others = salient_first(tokens, salient)
    near = ((cosines(tokens) + 1) / 2).clamp(0, 1).double()

    def covered(chosen: list[int]) -> float:
        return float(near[others][:, chosen].amax(1).sum())

    chosen: list[int] = []
    while len(chosen) < 12 - salient:
        left = [i for i in others if i not in chosen]
        chosen.append(max(left, key=lambda i: covered([*chosen, i])))
    pruner = build("promprune", stage2="facility_location", salient=salient, order="official")
    assert picks(pruner.prune(tokens, 12)) == first + chosen


@pytest.mark.parametrize("stage2", ["dpp", "farthest_point", "facility_location"])
@pytest.mark.parametrize("kind", ["gauss", "duplicates", "identical", "zero", "no_saliency"])
@pytest.mark.parametrize("salient", [0, 3, 7, 15])
def test_every_stage2_keeps_the_salient_tokens(kind: str, stage2: str, salient: int) -> None:
    tokens = visual_tokens(3, (4, 4), kind=kind)
    pruner = build("promprune", stage2=stage2, salient=salient, order="official")
    assert tokens.saliency is not None
    for keep in {max(salient, 1), 15}:
        selection = pruner.prune(tokens, keep)
        assert selection.diagnostics["T_sal"].tolist() == [salient] * 3
        for row in range(3):
            assert len(set(picks(selection, row))) == keep
            ranking = tokens.saliency[row].mean(0).argsort(descending=True, stable=True)
            assert picks(selection, row)[:salient] == ranking[:salient].tolist()


@pytest.mark.parametrize("stage2", ["farthest_point", "facility_location"])
def test_rows_of_other_splits_do_not_disturb_each_other(stage2: str) -> None:
    features = torch.cat([noise(1, 64, 32), noise(1, 64, 4) @ noise(4, 32, seed=1)])
    saliency = noise(2, 1, 64, seed=2).softmax(-1)
    pruner = build("promprune", mu=0.6, stage2=stage2, order="official")
    together = pruner.prune(VisualTokens(features=features, saliency=saliency), 16)
    few, many = together.diagnostics["T_sal"].tolist()
    assert few < many
    for row in range(2):
        alone = VisualTokens(features=features[[row]], saliency=saliency[[row]])
        assert picks(pruner.prune(alone, 16)) == picks(together, row)


def test_the_other_entropies_are_those_of_the_paper() -> None:
    """App. B.2, as shares of their largest value."""
    tokens = image(3)
    assert tokens.saliency is not None
    for name, weights in (
        ("attention", tokens.saliency[0].mean(0)),
        ("feature_norm", tokens.features[0].norm(dim=1)),
    ):
        p = (weights / weights.sum()).tolist()
        expected = -sum(x * math.log(x) for x in p) / math.log(40)
        found = build("promprune", entropy=name, mu=expected, tau=0.5).prune(tokens, 8)
        assert found.diagnostics["entropy"].tolist() == pytest.approx([expected], abs=1e-5)
        assert found.diagnostics["T_sal"].tolist() == [4]


def test_entropies_are_largest_for_equal_weights() -> None:
    equal = VisualTokens(features=torch.eye(9)[None], saliency=torch.full((1, 1, 9), 0.1))
    for name in ("attention", "feature_norm"):
        entropy = build("promprune", entropy=name).prune(equal, 3).diagnostics["entropy"]
        assert entropy.tolist() == pytest.approx([1.0])
    one = VisualTokens(features=torch.eye(9)[None], saliency=torch.eye(9)[None, :1])
    entropy = build("promprune", entropy="attention").prune(one, 3).diagnostics["entropy"]
    assert entropy.tolist() == pytest.approx([0.0], abs=1e-6)


def test_norms_that_differ_by_a_factor_of_two_have_an_entropy_near_one() -> None:
    """So the paper's mu of 0.42 leaves no salient token, as promprune_figure4 says."""
    directions = noise(1, 576, 8)
    directions /= directions.norm(dim=2, keepdim=True)
    for large in (1, 100, 192, 288, 575):
        norms = torch.ones(576, 1)
        norms[:large] = 2
        tokens = VisualTokens(
            features=directions * norms, saliency=noise(1, 1, 576, seed=1).softmax(-1)
        )
        found = build("promprune", entropy="feature_norm").prune(tokens, 64)
        assert float(found.diagnostics["entropy"]) > 0.99
        assert found.diagnostics["T_sal"].tolist() == [0]


@pytest.mark.parametrize(
    ("entropy", "script", "wrapper"), [(0.34, 63, 44), (0.42, 32, 26), (0.50, 1, 7)]
)
def test_the_two_released_settings(entropy: float, script: int, wrapper: int) -> None:
    """Salient tokens of 64, worked out from the released formula."""
    share = torch.tensor([entropy])
    for settings, count in (("script", script), ("wrapper", wrapper)):
        ratio = build("promprune", settings=settings).saliency_ratio(share)
        assert (ratio * 64).round().tolist() == [count]
    same = build("promprune", kr_min=0.1, kr_max=0.7).saliency_ratio(share)
    assert torch.equal(same, build("promprune", settings="wrapper").saliency_ratio(share))


@pytest.mark.parametrize("stage2", ["dpp", "farthest_point"])
def test_without_salient_tokens_stage2_may_start_far_from_the_mean(stage2: str) -> None:
    tokens = image(5)
    unit = tokens.features[0] / tokens.features[0].norm(dim=1, keepdim=True)
    far = int((unit - unit.mean(0)).norm(dim=1).argmax())
    assert far != 0
    options = {"stage2": stage2, "order": "official", "mu": -2.0}
    assert picks(build("promprune", **options).prune(tokens, 6))[0] == 0
    assert picks(build("promprune", **options, start="farthest").prune(tokens, 6))[0] == far
    options["mu"] = 0.98  # with salient tokens the start is the one farthest from these
    selection = build("promprune", **options, start="farthest").prune(tokens, 6)
    assert selection.diagnostics["T_sal"].item() > 0
    assert picks(selection) == picks(build("promprune", **options).prune(tokens, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": "wrapper", "kr_min": 0.2}, "settings=wrapper has limits of its own"),
        ({"settings": "wrapper", "kr_max": 0.7}, "leave out kr_min, kr_max"),
        ({"salient": 13, "settings": "wrapper"}, "salient=13 fixes the split"),
        ({"salient": 13, "entropy": "attention"}, "leave out settings, kr_min, kr_max, entropy"),
        ({"salient": 0, "kr_min": 0.5}, "salient=0 fixes the split"),
        ({"salient": -1}, "salient=-1: Input should be greater than or equal to 0"),
        ({"stage2": "facility_location", "start": "farthest"}, "leave out start=farthest"),
        ({"stage2": "kmeans"}, "stage2='kmeans': Input should be 'dpp', 'farthest_point' or"),
    ],
)
def test_promprune_refuses_fields_that_exclude_each_other(options: dict, message: str) -> None:
    with pytest.raises(PrunerError, match=f"pruner 'promprune': .*{message}"):
        build("promprune", **options)


def test_more_salient_tokens_than_the_budget_are_refused() -> None:
    pruner = build("promprune", salient=9)
    assert picks(pruner.prune(image(0), 9)) == sorted(salient_first(image(0), 9)[0])
    with pytest.raises(PrunerError, match="salient=9 is more than the budget of 8 tokens"):
        pruner.prune(image(0), 8)


# --- SCOPE ----------------------------------------------------------------------------------------


def test_scope_of_saliency_alone_keeps_the_most_salient_tokens() -> None:
    tokens = image(2)
    expected = salient_first(tokens, 9)[0]
    selection = build("scope", saliency="only", order="picked").prune(tokens, 9)
    assert picks(selection) == expected
    assert picks(build("scope", saliency="only").prune(tokens, 9)) == sorted(expected)
    assert picks(build("fastervlm").prune(tokens, 9)) == sorted(expected)


def test_scope_of_coverage_alone_does_not_look_at_saliency() -> None:
    tokens = image(2)
    assert tokens.saliency is not None
    other = dataclasses.replace(tokens, saliency=tokens.saliency.flip(2))
    pruner = build("scope", saliency="none", order="picked")
    assert picks(pruner.prune(tokens, 9)) == picks(pruner.prune(other, 9))
    both = build("scope", order="picked")
    assert picks(both.prune(tokens, 9)) != picks(both.prune(other, 9))


@pytest.mark.parametrize("saliency", ["none", "only"])
@pytest.mark.parametrize("options", [{"alpha": 2}, {"combine": "add"}])
def test_scope_refuses_fields_of_the_combination(saliency: str, options: dict) -> None:
    with pytest.raises(
        PrunerError, match=f"'scope': saliency={saliency} .*leave out alpha, combine"
    ):
        build("scope", saliency=saliency, **options)
