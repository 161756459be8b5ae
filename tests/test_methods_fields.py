"""Every field of every method refuses what its annotation does not allow."""

import dataclasses
import re
import typing
from typing import Any

import pytest
import torch
from pydantic.fields import FieldInfo

from secateur.pruners import REGISTRY, Pruner, PrunerError, build


@pytest.mark.parametrize(
    ("name", "field", "value", "expected"),
    [
        ("zspaprune", "core_ratio", -3, "greater than or equal to 0"),
        ("vispruner", "important_ratio", 1.01, "less than or equal to 1"),
        ("hiprune", "alpha", -0.1, "greater than or equal to 0"),
        ("hired", "alpha", 1.01, "less than or equal to 1"),
        ("holov", "bands", 0, "greater than or equal to 1"),
        ("fsr", "kappa", -1, "greater than or equal to 0"),
        ("fsr", "kappa", float("inf"), "a finite number"),
        ("prumerge", "neighbours", -5, "greater than or equal to 0"),
        ("prumerge", "neighbours", 2.5, "a valid integer"),
        ("sppruner", "merge_radius", -1, "greater than or equal to 0"),
        ("vispruner", "step", 0, "greater than or equal to 1"),
        ("dart", "text_pivots", -1, "greater than or equal to 0"),
        ("dart", "layer", 0, "greater than or equal to 1"),
        ("cdpruner", "theta", 1, "less than 1"),
        ("cdpruner", "theta", "0.5", "a valid number"),
        ("prunesid_dyn", "mean_phi", 0, "greater than 0"),
        ("prunesid_dyn", "mean_phi", 2.1, "less than or equal to 2"),
        ("visionzip", "contextual", -1, "greater than or equal to 0"),
        ("visionzip", "keep_cls", "false", "a valid boolean"),
        ("scope", "order", "random", "'spatial' or 'picked'"),
        ("pyramiddrop", "stages", (0, 8), "greater than or equal to 1"),
        ("pyramiddrop", "stages", "8", "a valid tuple"),
        ("pyramiddrop", "ratios", (1.5, 0.5, 0.2), "less than or equal to 1"),
        ("sparsevlm", "kept", (3, 2, 0), "greater than or equal to 1"),
        ("promprune", "mu", float("nan"), "a finite number"),
    ],
)
def test_values_outside_their_range(name: str, field: str, value: object, expected: str) -> None:
    with pytest.raises(PrunerError) as error:
        build(name, **{field: value})
    assert str(error.value) == f"pruner '{name}': {field}={value!r}: Input should be {expected}"


def test_values_get_the_type_of_their_field() -> None:
    alpha = build("fsr", alpha=1).alpha
    assert (type(alpha), alpha) == (float, 1.0)
    assert build("pyramiddrop", stages=[4, 8, 9]).stages == (4, 8, 9)


def test_a_field_may_hold_a_pruner_or_another_object() -> None:
    @dataclasses.dataclass(frozen=True)
    class Wrapper(Pruner):
        inner: Pruner
        dtype: torch.dtype = torch.float32
        seen: list = dataclasses.field(default_factory=list)

        name = "wrapper"

    inner = build("fastervlm")
    assert Wrapper(inner).inner is inner
    assert Wrapper(inner, seen=[1]).seen == [1]
    with pytest.raises(PrunerError, match="'wrapper': inner='fastervlm': Input should be"):
        Wrapper("fastervlm")  # type: ignore[arg-type]


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
        if re.search(r"\b(int|float)\b", repr(hint))
    ]


@pytest.mark.parametrize(("name", "field", "hint"), numbers(), ids=str)
def test_numbers_have_a_type_and_a_range(name: str, field: str, hint: Any) -> None:
    for value in (float("nan"), "4", True, [True], object()):
        with pytest.raises(PrunerError, match=f"'{name}': {field}=.*: Input should be a"):
            build(name, **{field: value})
    default = next(f.default for f in dataclasses.fields(REGISTRY[name]) if f.name == field)
    if default is None:
        assert getattr(build(name, **{field: None}), field) is None
    else:
        with pytest.raises(PrunerError, match=f"'{name}': {field}=None: Input should be a"):
            build(name, **{field: None})
    # every value of these two has a meaning
    assert FieldInfo.__name__ in repr(hint) or field in ("seed", "mu")


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


@pytest.mark.parametrize(
    ("name", "fields", "layers", "message"),
    [
        ("sparsevlm", {}, 40, "for 32 layers only, and this model has 40"),
        ("pyramiddrop", {"schedules": "scope"}, 40, r"40 layers.* 32 layers"),
        ("fastv", {"layer": 32}, 32, "layer=32 is not between the layers 0..31"),
        ("dart", {"layer": 40}, 28, "layer=40 is not between the layers 0..27"),
        (
            "pyramiddrop",
            {"stages": (8, 16, 36), "ratios": (0.5, 0.25, 0.125)},
            32,
            r"\(8, 16, 36\) do not fit into 32 layers",
        ),
        (
            "sparsevlm",
            {"stages": (3, 7, 30), "kept": (300, 200, 110)},
            28,
            r"\(3, 7, 30\) do not fit into 28 layers",
        ),
    ],
)
def test_a_schedule_for_another_depth_is_refused_with_both_numbers(
    name: str, fields: dict[str, Any], layers: int, message: str
) -> None:
    with pytest.raises(PrunerError, match=message):
        build(name, **fields).schedule(576, layers, 192)


def test_counts_of_ones_own_fit_a_13b_model() -> None:
    pruner = build("sparsevlm", kept=(300, 200, 110))
    assert pruner.schedule(576, 40, 192) == build("sparsevlm").schedule(576, 32, 192)
