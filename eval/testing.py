"""The contract of a pruner as one function, for the tests of methods inside and outside.

    from secateur import build
    from secateur.testing import check_pruner

    def test_mine():
        check_pruner(build("mine"))

It needs no model: the inputs are made up, with every capture filled.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from secateur.pruners.base import EXTRA, ImageShape, Pruner, PrunerError, Selection, VisualTokens
from secateur.pruners.in_llm import InLLMPruner, LayerTokens, PromptShape
from secateur.synthetic import KINDS, joined, layer_tokens, rows_of, visual_tokens

AnyPruner = Pruner | InLLMPruner
AnyTokens = VisualTokens | LayerTokens


def check_pruner(pruner: AnyPruner) -> None:
    """Check what every pruner promises, on images of several sizes and kinds.

    Its answers have the right count, are in range, distinct and in order; they are the same on a
    second call, in a batch and alone, and from strided tensors; the input is left as it was; all
    tokens go through untouched; wrong budgets and values that are not finite are refused; its
    fields can be written as JSON; its FLOPs are a number or None.

    A method may refuse a budget that it cannot hold with a PrunerError, but not all budgets.

    Raises:
        AssertionError: a promise is broken; the message says which one, and on which input.
        PrunerError: an answer of `select` that the harness refuses.
    """
    _check_class(pruner)
    held = 0
    for tokens, what in _inputs(pruner):
        count = tokens.shape[1]
        for keep in sorted({1, count // 4, count // 2, count - 1} - {0, count}):
            held += _check_answers(pruner, tokens, keep, f"{what}, keep {keep} of {count}")
        whole = pruner.prune(tokens, count)  # type: ignore[arg-type]
        rows = [list(range(count))] * tokens.shape[0]
        _promise(
            whole.indices.tolist() == rows and whole.features is None,
            f"with keep = N all tokens go through untouched ({what})",
        )
        _check_refusals(pruner, tokens, what)
    _promise(held > 0, f"{pruner.name!r} refuses every budget below the number of tokens")
    _check_batches(pruner)
    _check_flops(pruner)


def _promise(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(text)


def _check_class(pruner: AnyPruner) -> None:
    """Fields and facts, as records and tables need them."""
    fields = dataclasses.asdict(pruner)
    try:
        again = type(pruner)(**json.loads(json.dumps(fields)))
    except TypeError as error:
        raise AssertionError(f"the fields {fields} cannot be written as JSON: {error}") from None
    _promise(again == pruner, f"from JSON the fields {fields} make another method: {again}")
    reads = LayerTokens if isinstance(pruner, InLLMPruner) else VisualTokens
    known = {field.name for field in dataclasses.fields(reads)}
    unknown = ", ".join(sorted(set(pruner.needs) - known))
    _promise(not unknown, f"needs names {unknown}; {reads.__name__} has {', '.join(sorted(known))}")


def _inputs(pruner: AnyPruner) -> Iterator[tuple[AnyTokens, str]]:
    for seed, kind in enumerate(KINDS):
        for rows, columns in ((4, 4), (2, 6)):
            if isinstance(pruner, InLLMPruner):
                yield layer_tokens(2, rows * columns, seed=seed, kind=kind), f"kind {kind}"
            else:
                tokens = visual_tokens(2, (rows, columns), seed=seed, kind=kind)
                yield tokens, f"kind {kind}, grid {rows} x {columns}"


def _check_answers(pruner: Any, tokens: Any, keep: int, what: str) -> bool:
    """Check the answer for a budget; returns whether the pruner can hold it."""
    before = filled(tokens)
    try:
        selection = pruner.prune(tokens, keep)
    except PrunerError as error:
        if "select() " in str(error):  # a wrong answer, not a refusal
            raise
        return False
    batch, count = tokens.shape
    passed = pruner.tokens_after(count, keep) if isinstance(pruner, InLLMPruner) else keep
    passed = count if pruner.name == "none" else passed  # the unpruned model has no budget
    check_selection(selection, batch, count, passed, pruner.adaptive)
    _promise(same(selection, pruner.prune(tokens, keep)), f"the same input, another answer: {what}")
    after = filled(tokens)
    changed = ", ".join(name for name in before if not torch.equal(before[name], after[name]))
    _promise(not changed, f"select() changes its input {changed}: {what}")
    strided = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in before.items()}
    _promise(
        same(pruner.prune(dataclasses.replace(tokens, **strided), keep), selection),
        f"strided tensors give another answer: {what}",
    )
    return True


def _check_refusals(pruner: Any, tokens: Any, what: str) -> None:
    count = tokens.shape[1]
    for keep in (0, count + 1, 4.0):
        try:
            pruner.prune(tokens, keep)
        except PrunerError:
            continue
        raise AssertionError(f"the budget {keep} of {count} tokens is not refused: {what}")
    for name in sorted(pruner.needs):
        if isinstance(value := getattr(tokens, name), Tensor) and value.is_floating_point():
            bad = value.clone()
            bad.view(-1)[0] = torch.nan
            try:
                pruner.prune(dataclasses.replace(tokens, **{name: bad}), count)
            except PrunerError:
                continue
            raise AssertionError(f"NaN in {name} is not refused: {what}")


def _check_batches(pruner: Any) -> None:
    """Three unlike rows together give the answers of each alone."""
    inside = isinstance(pruner, InLLMPruner)
    make: Any = layer_tokens if inside else visual_tokens
    size: Any = 16 if inside else (4, 4)
    tokens = joined([make(1, size, seed=seed, width=48, kind=KINDS[seed % 2]) for seed in range(3)])
    for keep in (3, 4, 8):
        try:
            together = pruner.prune(tokens, keep)
        except PrunerError:
            continue
        for row in range(3):
            alone = pruner.prune(rows_of(tokens, [row]), keep)
            _promise(
                same(row_of(together, row), alone),
                f"image {row} of a batch of 3 gets another answer than alone, keep {keep}",
            )


def _check_flops(pruner: Any) -> None:
    if isinstance(pruner, InLLMPruner):
        shape: Any = PromptShape((16, 4, 4, 4), 10, 32, 32, 32)
    else:
        shape = ImageShape(tokens=16, kept=4, width=32, encoder_width=24)
    flops = pruner.flops(shape)
    _promise(
        flops is None or (isinstance(flops, int | float) and flops >= 0),
        f"flops() returns {flops!r}, expected a number of at least 0, or None",
    )


def check_selection(
    selection: Selection, batch: int, count: int, passed: int, adaptive: bool
) -> None:
    """Check count, range, distinctness and order of an answer for `batch` rows of `count` tokens.

    Args:
        passed: tokens per row, if the method is not adaptive.

    Raises:
        AssertionError: a promise is broken.
    """
    index = selection.indices
    _promise(index.shape[0] == batch, f"{index.shape[0]} rows of indices for {batch} images")
    counts = [index.shape[1]] * batch if selection.counts is None else selection.counts.tolist()
    if adaptive:
        _promise(
            all(1 <= n <= index.shape[1] for n in counts), f"counts {counts} of {index.shape[1]}"
        )
    else:
        _promise(counts == [passed] * batch, f"{counts} tokens per image, expected {passed}")
    for row, n in zip(index.tolist(), counts, strict=True):
        patches = [i for i in row[:n] if i != EXTRA]
        _promise(all(0 <= i < count for i in patches), f"indices {patches} of {count} tokens")
        _promise(len(set(patches)) == len(patches), f"a token twice: {patches}")
        _promise(selection.custom_order or patches == sorted(patches), f"not ascending: {patches}")
    if selection.features is None:
        _promise(bool((index != EXTRA).all()), "EXTRA tokens without features")
    else:
        _promise(selection.features.shape[:2] == index.shape, "features do not match the indices")
        _promise(bool(torch.isfinite(selection.features).all()), "features that are not finite")


def same(one: Selection, other: Selection) -> bool:
    """Equal indices, close features, equal counts, up to padding."""
    width = min(one.indices.shape[1], other.indices.shape[1])
    pairs = ((one.counts, other.counts), (one.indices[:, :width], other.indices[:, :width]))
    for x, y in pairs:
        if (x is None) != (y is None) or (
            x is not None and y is not None and not torch.equal(x, y)
        ):
            return False
    if one.features is None or other.features is None:
        return one.features is other.features
    return torch.allclose(one.features[:, :width], other.features[:, :width], atol=1e-5)


def row_of(selection: Selection, row: int) -> Selection:
    """The answer for one image of a batch."""
    parts: dict[str, Any] = {"indices": selection.indices[[row]]}
    if selection.features is not None:
        parts["features"] = selection.features[[row]]
    if selection.counts is not None:
        parts["counts"] = selection.counts[[row]]
    return dataclasses.replace(selection, **parts)


def filled(tokens: AnyTokens) -> dict[str, Tensor]:
    """Copies of the filled inputs by name."""
    return {
        field.name: value.clone()
        for field in dataclasses.fields(tokens)
        if isinstance(value := getattr(tokens, field.name), Tensor)
    }
