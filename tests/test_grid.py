"""The jobs of a sweep: fields named by method, seeds, and what is refused before anything runs."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from sweeping import cells

from secateur import grid
from secateur.grid import Methods

FIELDS = {"none": ["name"], "random": ["name", "seed"], "scope": ["name", "alpha", "order"]}
METHODS = Methods(frozenset(FIELDS), lambda name: FIELDS.get(name, []), "scope")


def jobs(*words: str) -> tuple[list[str], list[str]]:
    found, notes = grid.jobs(OverridesParser.create().parse_overrides(list(words)), METHODS)
    return [" ".join(job) for job in found], notes


def test_fields_are_for_their_method_alone_and_the_others_run_once():
    found, notes = jobs("pruner=none,scope", "budget=16", "scope.alpha=0.5,1", "scope.order=a")
    assert found == [
        "pruner=none budget=16",
        "pruner=scope budget=16 pruner.alpha=0.5 pruner.order=a",
        "pruner=scope budget=16 pruner.alpha=1 pruner.order=a",
    ]
    assert notes == []


def test_seeds_are_for_methods_with_a_seed_and_the_others_are_named():
    found, notes = jobs("pruner=none,random,scope", "seeds=0,1")
    assert found == [
        "pruner=none",
        "pruner=random pruner.seed=0",
        "pruner=random pruner.seed=1",
        "pruner=scope",
    ]
    assert notes == ["seeds: none, scope draw no random numbers and run once"]


def test_a_sweep_without_such_fields_is_hydras_own():
    assert jobs("pruner=none,scope", "budget=16,32", "limit=4")[0] == [
        f"pruner={pruner} budget={budget} limit=4"
        for pruner in ("none", "scope")
        for budget in (16, 32)
    ]
    # fields in braces are those of the sweep's usual method
    assert jobs("pruner={alpha:2},none", "scope.order=a")[0] == [
        "pruner={alpha:2} pruner.order=a",
        "pruner=none",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pruner=scope", "scope.alhpa=1"], "'scope' has no field alhpa; its fields: alpha, order"),
        (["pruner=none,scope", "random.seed=1"], "runs no random, only none, scope; add it"),
        (
            ["pruner=none,scope", "pruner.alpha=1"],
            "none has no field alpha; name the method: scope",
        ),
        (["pruner=random", "seeds=0,1", "random.seed=3"], "a seed of 'random': leave one out"),
        (["pruner=scope", "scope.alpha=interval(0,1)"], "a sweep takes values, not an interval"),
    ],
)
def test_what_cannot_be_is_named_with_the_fix(words, message):
    with pytest.raises(ValueError, match=message):
        jobs(*words)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["pruner=scope", "budget=16"], ["pruner=scope", "budget=16"]),
        (["pruner=scope", "-m", "budget=16"], ["-m", "pruner=scope", "budget=16"]),
        (["scope.alpha=2"], ["-m", "scope.alpha=choice(2)"]),
        (["scope.alpha=1,2"], ["-m", "scope.alpha=1,2"]),
        (["seeds=0"], ["-m", "seeds=choice(0)"]),
        (["model.dtype=auto", "limit=4"], ["model.dtype=auto", "limit=4"]),
    ],
)
def test_one_value_is_an_axis_too(given, taken):
    assert grid.arguments(given) == taken


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["seed=3"], "lmms-eval's own seed is task_seed=3; the seeds of the methods are seeds=0,1"),
        (["plugins=a.py,b.py"], r"write several files as a list, plugins=\[a.py,b.py\]"),
        (["plugins=[/nowhere/a.py]"], "plugins: there is no file /nowhere/a.py"),
    ],
)
def test_a_wrong_command_line_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        grid.arguments(given)


def test_a_budget_that_a_schedule_cannot_hold_is_told_before_anything_runs(sweeps, tmp_path):
    code, printed = sweeps.here(tmp_path, "-m", "pruner=none,fastv", "fastv.layer=2")
    assert code == 1
    assert printed.count("cannot average 16 tokens over 4 layers") == 1
    fix = "smallest larger budget that it can hold in this model is 50.7% (73 of 144 tokens)"
    assert fix in printed
    assert "(1 of 2 jobs: fastv at budget 16) Nothing was run." in printed
    assert not list(tmp_path.rglob("*.failed.json"))
    assert not cells(tmp_path)


def test_seeds_share_a_row_and_other_sweeps_have_tables_of_their_own(sweeps, tmp_path):
    code, printed = sweeps.here(tmp_path, "pruner=none,random", "seeds=0,1,2")
    assert code == 0, printed
    assert "seeds: none draw no random numbers and run once" in printed
    assert "cells: 8 done, 0 skipped, 0 failed" in printed
    (path,) = (tmp_path / "tables").glob("*.md")
    text = path.read_text()
    assert text.count("| random | 16 | 3 | 16.0 |") == 1
    assert "±" in text
    code, printed = sweeps.here(tmp_path, "-m", "pruner=none,random", "task_seed=1")
    assert code == 0, printed
    assert len(list((tmp_path / "tables").glob("*.md"))) == 2
    assert path.read_text() == text
