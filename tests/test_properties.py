"""What every pruner promises, on generated inputs, and how each answers bad ones."""

import dataclasses
import typing
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import KINDS, in_llm, joined, label, layer_tokens, rows_of, variants, visual_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.pruners import (
    REGISTRY,
    InLLMPruner,
    Pruner,
    PrunerError,
    Selection,
    VisualTokens,
    build,
)
from secateur.pruners.base import EXTRA
from secateur.pruners.tower import TowerPruner
from secateur.testing import check_pruner, check_selection, filled, row_of, same

BEFORE, INSIDE = variants(Pruner), variants(InLLMPruner)
NAMES = sorted(name for name in REGISTRY if not in_llm(name))
INSIDE_NAMES = sorted(name for name in REGISTRY if in_llm(name))
# answers that do not depend on where a token stands; exact ties, which fall to the lower index,
# rule the others out
EQUIVARIANT = {
    "cdpruner",
    "fastervlm",
    "hired",
    "none",
    "prumerge",
    "scope",
    "trim",
    "trimtokenator",
    "vispruner",
    "zspaprune",
}
EQUIVARIANT_INSIDE = {"fastv", "pyramiddrop", "sparsevlm"}

seeds, sides = st.integers(0, 2**31 - 1), st.integers(1, 5)


def allowed(pruner: Pruner, tokens: VisualTokens, keep: int) -> int:
    """The budget nearest to `keep` that the pruner can hold."""
    if pruner.name == "none":
        return tokens.shape[1]
    quarter = pruner.name == "pooling" or isinstance(pruner, TowerPruner)
    return max(1, tokens.shape[1] // 4) if quarter else keep


def unlike(make: Any, size: Any, seed: int) -> Any:
    """Three rows as unlike as the images of a call: independent, clustered and duplicate tokens."""
    kinds = enumerate(("gauss", "clusters", "duplicates"))
    return joined([make(1, size, seed=seed + row, width=48, kind=kind) for row, kind in kinds])


def without_twins(selection: Selection, ahead: int) -> Selection:
    """Gives two equal tokens one number, because rounding may decide between them.

    `ahead` positions come before token 0.
    """
    index = selection.indices
    return dataclasses.replace(
        selection, indices=torch.where(index == EXTRA, EXTRA, (index + ahead) // 2)
    )


@pytest.mark.parametrize(("name", "options"), BEFORE, ids=label)
@given(
    data=st.data(),
    seed=seeds,
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 3),
    sides=st.tuples(sides, sides),
)
def test_contract(
    name: str, options: dict, data: Any, seed: int, kind: str, batch: int, sides: tuple[int, int]
) -> None:
    pruner = build(name, **options)
    grid = (2 * sides[0], 2 * sides[1]) if name == "pooling" else sides
    width, text = data.draw(st.sampled_from([2, 16])), data.draw(st.integers(0, 3))
    tokens = visual_tokens(batch, grid, seed=seed, width=width, kind=kind, text=text)
    keep = allowed(pruner, tokens, data.draw(st.integers(1, grid[0] * grid[1])))
    before = filled(tokens)
    selection = pruner.prune(tokens, keep)
    count = grid[0] * grid[1]
    check_selection(selection, batch, count, keep, pruner.adaptive and keep < count)
    assert same(selection, pruner.prune(tokens, keep))
    assert all(torch.equal(before[key], value) for key, value in filled(tokens).items())


@pytest.mark.parametrize(("name", "options"), INSIDE, ids=label)
@given(
    data=st.data(),
    seed=seeds,
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 3),
    count=st.integers(1, 20),
)
def test_contract_inside(
    name: str, options: dict, data: Any, seed: int, kind: str, batch: int, count: int
) -> None:
    pruner = build(name, **options)
    tokens = layer_tokens(batch, count, seed=seed, kind=kind)
    keep = data.draw(st.integers(1, count))
    before = filled(tokens)
    selection = pruner.prune(tokens, keep)
    check_selection(selection, batch, count, pruner.tokens_after(count, keep), pruner.adaptive)
    assert same(selection, pruner.prune(tokens, keep))
    assert all(torch.equal(before[key], value) for key, value in filled(tokens).items())


@pytest.mark.parametrize(
    ("name", "options"), [*BEFORE, *INSIDE, ("prunesid_dyn", {"mean_phi": 0.9})], ids=label
)
@settings(max_examples=15)
@given(data=st.data(), seed=seeds, rows=sides, columns=sides)
def test_a_batch_equals_its_rows(
    name: str, options: dict, data: Any, seed: int, rows: int, columns: int
) -> None:
    pruner = build(name, **options)
    if in_llm(name):
        tokens = unlike(layer_tokens, rows * columns, seed)
        keep = data.draw(st.integers(1, rows * columns))
    else:
        grid = (2 * rows, 2 * columns) if name == "pooling" else (rows, columns)
        tokens = unlike(visual_tokens, grid, seed)
        keep = allowed(pruner, tokens, data.draw(st.integers(1, grid[0] * grid[1])))
    together = pruner.prune(tokens, keep)
    for row in range(3):
        alone = pruner.prune(rows_of(tokens, [row]), keep)
        mine = row_of(together, row)
        if row == 2:
            mine, alone = (
                without_twins(selection, 3 if in_llm(name) else 0) for selection in (mine, alone)
            )
        assert same(mine, alone)


@pytest.mark.parametrize("name", sorted((EQUIVARIANT | EQUIVARIANT_INSIDE) & set(REGISTRY)))
@given(data=st.data(), seed=seeds, count=st.integers(2, 24))
def test_permuted_tokens_give_the_same_choice(name: str, data: Any, seed: int, count: int) -> None:
    pruner = build(name)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if in_llm(name):
        tokens: Any = layer_tokens(2, count, seed=seed, width=48)
        positions = torch.cat([torch.arange(3), 3 + order, torch.arange(3 + count, count + 9)])
        moved = dataclasses.replace(
            tokens,
            hidden=tokens.hidden[:, positions],
            attention=tokens.attention[..., positions],
            keys=tokens.keys[:, :, positions],
        )
        keep = data.draw(st.integers(1, count))
    else:
        tokens = visual_tokens(2, (1, count), seed=seed, width=48)
        with_cls = torch.cat([torch.zeros(1, dtype=torch.long), 1 + order])
        axes = dict.fromkeys(("features", "encoder_features", "clip_patches", "relevance"), order)
        axes |= dict.fromkeys(("encoder_keys", "last_queries", "last_keys"), with_cls)
        parts = {key: getattr(tokens, key)[:, place] for key, place in axes.items()}
        moved = dataclasses.replace(tokens, saliency=tokens.saliency[..., order], **parts)
        keep = allowed(pruner, tokens, data.draw(st.integers(1, count)))

    def chosen(selection: Selection, names: Tensor) -> list[set[int]]:
        return [{int(names[i]) for i in row if i != EXTRA} for row in selection.indices.tolist()]

    assert chosen(pruner.prune(tokens, keep), torch.arange(count)) == chosen(
        pruner.prune(moved, keep), order
    )


# tome merges inside the encoder, which has to run for it
@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"tome"}))
def test_the_public_check(name: str) -> None:
    check_pruner(build(name))


def sample(name: str) -> tuple[Any, Any, int]:
    """A pruner, good input of 16 tokens in 2 rows, and a budget it holds."""
    pruner = build(name)
    if in_llm(name):
        return pruner, layer_tokens(2, 16), 4
    tokens = visual_tokens(2, (4, 4))
    return pruner, tokens, allowed(pruner, tokens, 4)


@pytest.mark.parametrize("name", sorted(REGISTRY))
@pytest.mark.parametrize("keep", [-1, 0, 17, 4.0, "4", None, True])
def test_impossible_budget(name: str, keep: int) -> None:
    pruner, tokens, _ = sample(name)
    with pytest.raises(
        PrunerError,
        match=f"'{name}': cannot keep {keep!r} of 16 tokens; the budget must be an integer",
    ):
        pruner.prune(tokens, keep)


def floats(name: str, tokens: Any) -> list[str]:
    """Names of the needed captures that are tensors."""
    return sorted(key for key in build(name).needs if isinstance(getattr(tokens, key), Tensor))


@pytest.mark.parametrize("name", sorted(REGISTRY))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(name: str, value: float) -> None:
    pruner, tokens, keep = sample(name)
    for key in floats(name, tokens):
        bad = getattr(tokens, key).clone()
        bad.view(-1)[5] = value
        with pytest.raises(PrunerError, match=rf"'{name}': NaN or infinite values in {key} \[\d"):
            pruner.prune(dataclasses.replace(tokens, **{key: bad}), keep)


@pytest.mark.parametrize("name", NAMES)
def test_integers_are_no_captures(name: str) -> None:
    pruner, tokens, keep = sample(name)
    for key in floats(name, tokens):
        bad = dataclasses.replace(tokens, **{key: getattr(tokens, key).long()})
        with pytest.raises(
            PrunerError, match=f"'{name}': expects floating point, and got {key} torch.int64"
        ):
            pruner.prune(bad, keep)


@pytest.mark.parametrize("name", NAMES)
def test_features_that_are_no_tensor_and_impossible_grids(name: str) -> None:
    pruner, tokens, keep = sample(name)
    for bad, told in (
        ({"features": None}, "features are a NoneType"),
        ({"grid": (-4, -4)}, r"grid \(-4, -4\) does not hold 16"),
    ):
        with pytest.raises(PrunerError, match=f"'{name}': {told}"):
            pruner.prune(dataclasses.replace(tokens, **bad), keep)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_missing_captures(name: str) -> None:
    pruner, tokens, keep = sample(name)
    for key in build(name).needs - {"features"}:
        with pytest.raises(PrunerError, match=f"'{name}': needs '{key}'"):
            pruner.prune(dataclasses.replace(tokens, **{key: None}), keep)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_wrong_shapes_are_named(name: str) -> None:
    pruner, tokens, keep = sample(name)
    for key in floats(name, tokens):
        good = getattr(tokens, key)
        for bad in (good[0], good[:1], good[..., None], good[..., :0]):
            if key == "features" and bad is not good[..., :0] and bad.dim() == 3:
                continue  # one row of features makes the other captures wrong, not the features
            with pytest.raises(PrunerError, match=f"'{name}': {key} (has|have) shape .*expected"):
                pruner.prune(dataclasses.replace(tokens, **{key: bad}), keep)


@pytest.mark.parametrize("name", [name for name in NAMES if "saliency" in build(name).needs])
def test_saliency_of_wrong_length(name: str) -> None:
    pruner, tokens, keep = sample(name)
    bad = dataclasses.replace(tokens, saliency=tokens.saliency[..., :-1])
    expected = rf"'{name}': saliency has shape \(2, 2, 15\), expected \[B = 2, H = 2, N = 16\]"
    with pytest.raises(PrunerError, match=expected):
        pruner.prune(bad, keep)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name: str) -> None:
    pruner, tokens, keep = sample(name)
    with pytest.raises(
        PrunerError, match=rf"'{name}': features have shape \(0, 16, 16\), expected \[B, N, D\]"
    ):
        pruner.prune(rows_of(tokens, []), keep)


@pytest.mark.parametrize("name", INSIDE_NAMES)
def test_no_rows_inside(name: str) -> None:
    pruner, tokens, keep = sample(name)
    with pytest.raises(PrunerError, match=rf"'{name}': visual has shape \(0, 16\), expected"):
        pruner.prune(rows_of(tokens, []), keep)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_all_tokens_go_through_untouched(name: str) -> None:
    pruner, tokens, _ = sample(name)
    for few in (tokens, visual_tokens(2, (1, 1)) if not in_llm(name) else layer_tokens(2, 1)):
        selection = pruner.prune(few, few.shape[1])
        assert selection.features is None
        assert selection.indices.tolist() == [list(range(few.shape[1]))] * 2


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_half_precision_is_scored_in_float32(name: str) -> None:
    pruner, tokens, keep = sample(name)
    half = {key: v.half() for key, v in filled(tokens).items() if v.is_floating_point()}
    single = {key: v.float() for key, v in half.items()}
    a = pruner.prune(dataclasses.replace(tokens, **half), keep)
    b = pruner.prune(dataclasses.replace(tokens, **single), keep)
    assert same(a, b)
    assert a.features is None or a.features.dtype == torch.float32


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_strided_tensors(name: str) -> None:
    pruner, tokens, keep = sample(name)
    strided = {
        key: v.transpose(0, -1).contiguous().transpose(0, -1) for key, v in filled(tokens).items()
    }
    assert same(
        pruner.prune(dataclasses.replace(tokens, **strided), keep), pruner.prune(tokens, keep)
    )


@pytest.mark.parametrize("name", NAMES)
def test_masked_question_tokens_do_not_matter(name: str) -> None:
    pruner, tokens, keep = sample(name)
    padded = torch.cat([tokens.text_embeddings, torch.full((2, 2, 16), 7.0)], 1)
    mask = torch.cat([tokens.text_mask, torch.zeros(2, 2, dtype=torch.bool)], 1)
    assert same(
        pruner.prune(tokens, keep),
        pruner.prune(dataclasses.replace(tokens, text_embeddings=padded, text_mask=mask), keep),
    )


@pytest.mark.parametrize("name", INSIDE_NAMES)
def test_prompt_without_text(name: str) -> None:
    pruner, tokens, keep = sample(name)
    with pytest.raises(PrunerError, match=f"'{name}': text has a row without a real position"):
        pruner.prune(dataclasses.replace(tokens, text=torch.zeros_like(tokens.text)), keep)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_unknown_values_and_options_are_errors(name: str) -> None:
    with pytest.raises(PrunerError, match=f"pruner '{name}' has no option nonsense"):
        build(name, nonsense=1)
    for variant, options in BEFORE + INSIDE:
        for field in options if variant == name else ():
            if isinstance(options[field], str):
                with pytest.raises(PrunerError) as error:
                    build(name, **{field: "nonsense"})
                message = str(error.value)
                assert f"'{name}': {field}='nonsense': Input should be '" in message
                choices = typing.get_args(typing.get_type_hints(REGISTRY[name])[field])
                assert all(repr(choice) in message for choice in choices)


def test_unknown_name() -> None:
    with pytest.raises(PrunerError, match=r"unknown pruner 'unheard'; known: .*scope"):
        build("unheard")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"space": "encodr"},
            "space='encodr', which is not one of 'encoder', 'projected', 'hidden'",
        ),
        (
            {"diagnostics": {"phi": torch.zeros(2, 1)}},
            r"diagnostic 'phi' of shape \(2, 1\), expected \[2\]",
        ),
        (
            {"diagnostics": {"phi": torch.zeros(())}},
            r"diagnostic 'phi' of shape \(\), expected \[2\]",
        ),
        ({"counts": torch.tensor([[1], [2]])}, r"counts of shape \(2, 1\), expected \[2\]"),
        ({"counts": torch.tensor([1, 3])}, r"counts \[1, 3\] outside 1..2"),
    ],
)
def test_a_wrong_answer_is_refused(parts: dict, message: str) -> None:
    indices = torch.tensor([[0, 1], [2, 3]])
    Selection(indices, diagnostics={"phi": torch.zeros(2)}, counts=torch.tensor([1, 2])).check(
        "mine", 2, 4
    )
    with pytest.raises(PrunerError, match=f"'mine' returned {message}"):
        Selection(indices, **parts).check("mine", 2, 4)


@pytest.mark.parametrize("name", INSIDE_NAMES)
def test_tokens_by_layer(name: str) -> None:
    pruner = build(name)
    counts, plan = pruner.layer_tokens(576, 32, 192), pruner.schedule(576, 32, 192)
    assert counts[: min(plan)] == [576] * min(plan)
    for layer in range(1, 32):
        after = (
            pruner.tokens_after(counts[layer - 1], plan[layer])
            if layer in plan
            else counts[layer - 1]
        )
        assert counts[layer] == after
    assert pruner.average(576, 32, 192) == sum(counts) / 32


def test_positions_are_declared_by_every_method_in_the_llm() -> None:
    class Silent(InLLMPruner):
        name = "silent"

    assert Silent().positions == "original"
    assert {name: build(name).positions for name in INSIDE_NAMES} == {
        "dart": "original",
        "fastv": "original",
        "pact": "original",
        "pyramiddrop": "reindex",
        "sparsevlm": "reindex",
    }


class Waits(TorchDispatchMode):
    """Counts the values that the host asks of the device, which make a GPU wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        asked = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        self.count += func in asked
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, method in sorted(REGISTRY.items())
        if issubclass(method, Pruner) and name != "tome"  # which merges inside the encoder
    ],
)
def test_the_host_waits_once_for_a_selection(name):
    """Only suppression, whose number of rounds depends on the data, waits for every round."""
    options = {"prunesid_dyn": {"mean_phi": 0.4}}.get(name, {})
    tokens = visual_tokens(2, (6, 6), width=64)
    with Waits() as waits:
        build(name, **options).prune(tokens, 9 if name == "pooling" else 12)
    assert (waits.count > 1) if name in ("prunesid", "prunesid_dyn") else (waits.count == 1)
