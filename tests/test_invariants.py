"""The invariants of injection on the newer families, and the table of all of them.

The first families have files of their own with the same and more.
"""

import pytest

from secateur.invariants import INVARIANTS, measure, table


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_the_invariants_hold(family, kernel):
    found = measure(family, kernel)
    for name, (_, bound) in INVARIANTS.items():
        assert found[name] is None or found[name] <= bound, name
    assert sum(value is None for value in found.values()) <= 2


def test_the_table_has_the_largest_of_all_kernels_and_names_what_is_broken():
    small, nothing = dict.fromkeys(INVARIANTS, 0.0), dict.fromkeys(INVARIANTS)
    large = small | {"batch as single prompts": 0.5, "images from the cache": float("inf")}
    text, broken = table({"llava": [small, nothing], "internvl": [large, small]})
    lines = text.splitlines()
    assert lines[0] == "| invariant | allowed | llava | internvl |"
    assert "| batch as single prompts | 0.0001 | 0 | 0.5 |" in lines
    assert broken == [
        "internvl: batch as single prompts: 0.5 is above 0.0001",
        "internvl: images from the cache: inf is above 0.0001",
    ]
    assert "| - |" in table({"llava": [nothing]})[0]
