"""Every field of every method refuses what its annotation does not allow."""

import dataclasses
import typing
from typing import Any

import pytest

from secateur.pruners import REGISTRY, PrunerError, build
from secateur.pruners.fields import Range


@pytest.mark.parametrize(
    ("name", "field", "value", "expected"),
    [
        ("zspaprune", "core_ratio", -3, "a number in [0, 1]"),
        ("vispruner", "important_ratio", 1.01, "a number in [0, 1]"),
        ("hiprune", "alpha", -0.1, "a number in [0, 1]"),
        ("fsr", "kappa", -1, "a number in [0, inf)"),
        ("fsr", "kappa", float("inf"), "a number in [0, inf)"),
        ("prumerge", "neighbours", -5, "an integer in [0, inf)"),
        ("prumerge", "neighbours", 2.5, "an integer in [0, inf)"),
        ("sppruner", "merge_radius", -1, "an integer in [0, inf)"),
        ("vispruner", "step", 0, "an integer in [1, inf)"),
        ("dart", "text_pivots", -1, "an integer in [0, inf)"),
        ("dart", "layer", 0, "an integer in [1, inf)"),
        ("cdpruner", "theta", 1, "a number in [0, 1) or None"),
        ("cdpruner", "theta", "0.5", "a number in [0, 1) or None"),
        ("prunesid_dyn", "mean_phi", 0, "a number in (0, 2] or None"),
        ("visionzip", "contextual", -1, "an integer in [0, inf) or None"),
        ("visionzip", "keep_cls", "false", "true or false"),
        ("pyramiddrop", "stages", (0, 8), "a list with each item an integer in [1, inf)"),
        ("pyramiddrop", "stages", "8", "a list with each item an integer in [1, inf)"),
        (
            "pyramiddrop",
            "ratios",
            (1.5, 0.5, 0.2),
            "a list with each item a number in [0, 1] or None",
        ),
        ("sparsevlm", "kept", (3, 2, 0), "a list with each item an integer in [1, inf) or None"),
        ("promprune", "mu", float("nan"), "a number"),
    ],
)
def test_values_outside_their_range(name: str, field: str, value: object, expected: str) -> None:
    with pytest.raises(PrunerError) as error:
        build(name, **{field: value})
    assert str(error.value) == f"pruner '{name}': {field}={value!r} is not {expected}"


def numbers() -> list[tuple[str, str, Any]]:
    """(pruner, field, annotation) of every field that holds a number or None."""
    fields = [
        (name, f.name, cls) for name, cls in REGISTRY.items() for f in dataclasses.fields(cls)
    ]
    hints = [
        (name, field, typing.get_type_hints(cls, include_extras=True)[field])
        for name, field, cls in fields
    ]
    return [
        (name, field, hint)
        for name, field, hint in hints
        if any(word in repr(hint) for word in ("int", "float"))
    ]


@pytest.mark.parametrize(("name", "field", "hint"), numbers(), ids=str)
def test_numbers_have_a_type_and_a_range(name: str, field: str, hint: Any) -> None:
    for value in (float("nan"), "4", True, [True], object()):
        with pytest.raises(PrunerError, match=f"'{name}': {field}=.* is not a"):
            build(name, **{field: value})
    default = next(f.default for f in dataclasses.fields(REGISTRY[name]) if f.name == field)
    if default is None:
        assert getattr(build(name, **{field: None}), field) is None
    else:
        with pytest.raises(PrunerError, match=f"'{name}': {field}=None is not a"):
            build(name, **{field: None})
    assert Range.__name__ in repr(hint) or field in (
        "seed",
        "mu",
    )  # of these two every value has a meaning


def test_methods_in_the_llm_need_ascending_stages() -> None:
    for name in ("pyramiddrop", "sparsevlm"):
        for stages in ([], [4, 4], [8, 4]):
            with pytest.raises(
                PrunerError, match=f"'{name}': stages=.* have to be at least one and ascend"
            ):
                build(name, stages=stages)
        assert build(name, stages=[4, 8, 9]).stages == (4, 8, 9)
    with pytest.raises(
        PrunerError, match="'dart': image_pivots=0 and text_pivots=0 leave no pivot"
    ):
        build("dart", image_pivots=0, text_pivots=0)
