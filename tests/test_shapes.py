"""The generator: the same seed gives the same data, and answers are true of the picture."""

import ast
import re
from collections import defaultdict

import numpy as np
import pytest

from secateur.shapes.datasets import EVAL, SIZES, TRAIN, documents
from secateur.shapes.questions import (
    CLAIMS,
    CORNERS,
    DOCUMENTS,
    ITEMS,
    POPE_CATEGORIES,
    kind_of,
)
from secateur.shapes.scenes import MOST, SIZE, coverage, make_scene, render


def test_the_same_seed_draws_the_same_picture():
    for i in range(5):
        scene = make_scene(3, i)
        assert scene == make_scene(3, i)
        assert np.array_equal(np.asarray(render(scene)), np.asarray(render(scene)))
    assert not np.array_equal(
        np.asarray(render(make_scene(3, 0))), np.asarray(render(make_scene(3, 1)))
    )


def test_things_are_distinct_visible_and_inside():
    for i in range(200):
        scene = make_scene(4, i)
        assert 1 <= len(scene.things) <= MOST
        assert len(scene.names) == len(scene.things)
        shares = sum(coverage(thing) for thing in scene.things)
        assert all(coverage(thing).sum() > 100 for thing in scene.things)
        assert (shares > 1.5).sum() < 0.02 * SIZE**2  # they hardly overlap
        assert all(0 < thing.x < SIZE and 0 < thing.y < SIZE for thing in scene.things)


def truth(scene, question: str) -> str:
    """Answer a question from its words and the scene, independently of the generator."""
    things = scene.things

    def called(name: str):
        """The only thing with the words of the name."""
        wanted = set(name.split()) - {"object"}
        (thing,) = [t for t in things if wanted <= {t.color, t.shape}]
        return thing

    words = question.rstrip("?").split()
    if question.startswith("Is there a"):
        wanted = set(words) - {"Is", "there", "a", "an", "in", "the", "image", "object"}
        return "yes" if any(wanted <= {t.color, t.shape} for t in things) else "no"
    if question.startswith("How many objects"):
        return str(len(things))
    if question.startswith("What color is the") and len(words) == 5:
        return next(t.color for t in things if t.shape == words[-1])
    if question.startswith("What shape"):
        return next(t.shape for t in things if t.color == words[4])
    if question.startswith("How many corners"):
        return str(next(CORNERS[t.shape] for t in things if t.color == words[5]))
    if place := re.fullmatch(r"Is the (\w+) (\w+)\?", question):
        return "yes" if called(place[1]).color == place[2] else "no"
    if place := re.fullmatch(r"Is the number of objects in the image (\d+)\?", question):
        return "yes" if len(things) == int(place[1]) else "no"
    if question.startswith("What is the number of objects plus"):
        return str(len(things) + int(words[-1]))
    if question.startswith("What color is the object with"):
        return next(t.color for t in things if CORNERS[t.shape] == int(words[6]))
    raise AssertionError(question)


@pytest.mark.parametrize("name", sorted(set(ITEMS) - {"which_object"}))
def test_answers_are_true_and_wrong_ones_are_not(name):
    asked = 0
    for i in range(150):
        scene = make_scene(5, i)
        item = ITEMS[name](scene, np.random.default_rng(i))
        if item:
            asked += 1
            question, answer, wrong = item
            assert truth(scene, question) == answer
            assert kind_of(question) == name
            assert answer not in wrong
            assert len(set(wrong)) == len(wrong) >= 1
    assert asked > 30


@pytest.mark.parametrize("name", sorted(set(CLAIMS) - {"has_corners", "count_plus_is"}))
def test_claims_are_true_and_false(name):
    asked = 0
    for i in range(150):
        scene = make_scene(6, i)
        claim = CLAIMS[name](scene, np.random.default_rng(i))
        if claim:
            asked += 1
            assert [truth(scene, question) for question in claim] == ["yes", "no"]
            assert {kind_of(question) for question in claim} == {name}
    assert asked > 30


def test_adversarial_absences_share_colour_or_shape_with_the_scene():
    for i in range(100):
        scene = make_scene(7, i)
        *_, color, shape = (
            CLAIMS["existence"](scene, np.random.default_rng(i), "adversarial")[1]
            .removesuffix(" in the image?")
            .split()
        )
        assert color in {t.color for t in scene.things} or shape in {t.shape for t in scene.things}


@pytest.mark.parametrize("task", sorted(DOCUMENTS))
def test_every_task_has_its_documents_on_held_out_scenes(task):
    made = list(documents(task, EVAL, SIZES[task][0]))
    assert len(made) == SIZES[task][0] >= 200
    train = {seed for seed, _ in documents(task, TRAIN, 20)}
    assert not train & {seed for seed, _ in made}
    prefix = [doc for _, doc in made[:60]]
    if task == "pope":
        assert {doc["category"] for doc in prefix} == set(POPE_CATEGORIES)
        assert [doc["answer"] for doc in prefix] == ["yes", "no"] * 30
    if task == "mme":
        for first, second in zip(prefix[::2], prefix[1::2], strict=True):
            assert first["question_id"] == second["question_id"]
            assert (first["answer"], second["answer"]) == ("Yes", "No")
    if task == "mmmu_val":
        assert {doc["question_type"] for doc in prefix} == {"open", "multiple-choice"}
        assert all(isinstance(ast.literal_eval(doc["options"]), list) for doc in prefix)
    if task == "mmstar":
        assert len({doc["category"] for doc in prefix}) == 6
    if task == "vqav2":
        for doc in prefix:
            words = [one["answer"] for one in doc["answers"]]
            assert len(words) == 10
            assert words.count(doc["multiple_choice_answer"]) >= 7
    if task == "mmbench_en":
        circles = defaultdict(list)
        for doc in prefix:
            circles[doc["index"] % 10**6].append(doc)
        for circle in circles.values():
            rotations = [doc["index"] // 10**6 for doc in circle]
            assert rotations == list(range(4 if circle[0]["C"] != "nan" else 2))
            assert len({doc[doc["answer"]] for doc in circle}) == 1
            assert {doc["answer"] for doc in circle} == set("ABCD"[: len(circle)])
        assert {doc["hint"] == "nan" for doc in prefix} == {True, False}


def test_letters_are_not_predictable():
    letters = [doc["answer"] for _, doc in documents("mmstar", EVAL, 240)]
    assert max(letters.count(letter) for letter in "ABCD") < 90
