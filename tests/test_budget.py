import pytest

from secateur.budget import Budget


@pytest.mark.parametrize(
    ("value", "available", "keep"),
    [
        (64, 576, 64),
        ("64", 576, 64),
        ("11.1%", 576, 64),
        (0.222, 576, 128),
        ("33.3%", 144, 48),
        ("0.1%", 144, 1),
        ("full", 144, 144),
    ],
)
def test_budgets_resolve_to_exact_counts(value, available, keep):
    assert Budget.parse(value).resolve(available) == keep


def test_a_half_rounds_up():
    assert Budget.parse("50%").resolve(5) == 3


@pytest.mark.parametrize("value", [0, -1, "0%", "100.1%", "1.5", "-0.2", "", "all", None, "12px"])
def test_what_makes_no_sense_is_refused(value):
    with pytest.raises(ValueError, match="budget"):
        Budget.parse(value)


def test_more_than_there_is_names_both_numbers():
    with pytest.raises(ValueError, match=r"600.*576"):
        Budget.parse(600).resolve(576)


@pytest.mark.parametrize(
    ("value", "sizes", "shares"),
    [
        (64, [729, 7290], [6, 58]),
        ("22.2%", [729, 1458], [162, 324]),
        (2, [729, 7290], [1, 1]),
        (5, [1, 100], [1, 4]),
        (6, [100, 1], [5, 1]),
        ("full", [16, 48], [16, 48]),
        (63, [16, 48], [16, 47]),
    ],
)
def test_sections_share_a_budget_in_proportion(value, sizes, shares):
    assert Budget.parse(value).of_sections(sizes) == shares


def test_every_section_keeps_a_token():
    with pytest.raises(ValueError, match="budget=1: an image has 2 sections, and at least 1 token"):
        Budget.parse(1).of_sections([729, 7290])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("11.1%", "11.1%"),
        (0.111, "11.1%"),
        ("33.3%", "33.3%"),
        ("50%/tile", "50%/tile"),
        (1.0, "100%"),
        (1e-05, "0.001%"),
        ("11.45833233%", "11.45833233%"),  # 16 of 144 tokens
        ("11.45833433%", "11.45833433%"),  # 17 of 144 tokens
    ],
)
def test_a_retention_is_written_exactly(value, text):
    assert str(Budget.parse(value)) == text
    assert Budget.parse(text) == Budget.parse(value)
