"""The sentences of a report: who differs beyond noise, and nothing of the kind with few images."""

from cells import changed
from stored import grid

from secateur.reporting.comparison import compare
from secateur.reporting.findings import findings
from secateur.reporting.interval_table import markdown


def seeds_of(cells, name):
    own = [cell for cell in cells if cell.name == name]
    return [*cells, *(new for s in (1, 2) for new in changed(own, {"identity.pruner.seed": s}))]


def test_methods_are_named_by_their_difference_to_the_unpruned_model_and_to_random():
    cells = grid(("gqa", "pope"), 1000, 1000, random=0.4, scope=0.8, uniform=0.6)
    text = " ".join(findings(compare(seeds_of(cells, "random"), 200)))
    assert (
        "16 tokens, beside the unpruned model: 2 of 3 methods lower beyond noise (random, uniform)"
        "; no difference beyond noise for 1 (scope)." in text
    )
    assert "beside random: 2 of 2 methods higher beyond noise (scope, uniform)." in text
    assert "about the average over the tasks" in text


def test_without_an_average_every_task_has_its_sentence():
    text = " ".join(findings(compare(grid(("gqa",), 1000, 1000, scope=0.5), 200)))
    assert "GQA: 16 tokens, beside the unpruned model: 1 of 1 methods lower" in text
    assert "No sentence about random: it needs three seeds" in text


def test_below_fifty_images_nothing_is_called_a_difference():
    text = " ".join(findings(compare(grid(("gqa",), 400, 400, scope=0.2), 200)))
    assert "Too few images for a statement about noise (as few as 40 in a task" in text
    assert "beyond noise" not in text


def test_a_note_counts_many_rows_and_names_the_worst():
    names = ("random", "scope", "uniform", "divprune", "fastervlm", "promprune", "visionzip")
    cells = grid(("gqa",), 400, 400, **dict.fromkeys(names, 0.5))
    cells = [
        *cells[:1],
        *(
            changed([cell], {"unusable_answers": 3 + number})[0]
            for number, cell in enumerate(cells[1:])
        ),
    ]
    text = markdown(cells, compare(cells, 100))
    assert "gqa, all rows: 40 images: intervals are too short." in text
    worst = "9 of 400 answers are unusable in visionzip 16, no more in the others."
    assert f"gqa, 7 of 8 rows: {worst}" in text
