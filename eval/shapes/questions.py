"""Questions about a scene, in the schemas of eight data sets.

`ITEMS` ask for a word and also give wrong answers; `CLAIMS` are true or false. Both return None
where the question would be ambiguous in the scene. `DOCUMENTS` builds rows of the data sets from
them, without images.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from secateur.shapes.scenes import COLORS, KIND_ODDS, KINDS, MOST, SHAPES, Scene, Thing

Rng = np.random.Generator
Item = tuple[str, str, list[str]]  # question, answer, wrong answers
Claim = tuple[str, str]  # a question whose answer is yes, and a like one whose answer is no
Doc = dict[str, Any]

CORNERS = {"circle": 0, "triangle": 3, "square": 4, "cross": 12}


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _pick(rng: Rng, options: list) -> Any:
    return options[int(rng.integers(len(options)))] if options else None


def _unique(scene: Scene, attribute: str) -> list[Thing]:
    """Things whose `attribute` (color or shape) no other thing of the scene has."""
    values = [getattr(thing, attribute) for thing in scene.things]
    return [thing for thing in scene.things if values.count(getattr(thing, attribute)) == 1]


def _absent(scene: Scene, rng: Rng, category: str) -> str:
    """A kind that is not in the scene.

    By category: any (random), a frequent one (popular), or one that shares colour or shape with a
    thing of the scene (adversarial).
    """
    absent = [i for i, (color, shape) in enumerate(KINDS) if f"{color} {shape}" not in scene.names]
    if category == "popular":
        absent = sorted(absent, key=lambda i: -KIND_ODDS[i])[:6]
    elif category == "adversarial":
        colors, shapes = (
            {thing.color for thing in scene.things},
            {thing.shape for thing in scene.things},
        )
        absent = [i for i in absent if KINDS[i][0] in colors or KINDS[i][1] in shapes]
    return " ".join(KINDS[_pick(rng, absent)])


# --- questions that ask for a word


def color_of(scene: Scene, rng: Rng) -> Item | None:
    """Ask for the color of the only thing of its shape; None if there is none."""
    thing = _pick(rng, _unique(scene, "shape"))
    if thing is None:
        return None
    return f"What color is the {thing.shape}?", thing.color, [c for c in COLORS if c != thing.color]


def shape_of(scene: Scene, rng: Rng) -> Item | None:
    """Ask for the shape of the only thing of its color; None if there is none."""
    thing = _pick(rng, _unique(scene, "color"))
    if thing is None:
        return None
    return (
        f"What shape is the {thing.color} object?",
        thing.shape,
        [s for s in SHAPES if s != thing.shape],
    )


def count(scene: Scene, rng: Rng) -> Item:
    """Ask for the number of things."""
    return (
        "How many objects are there?",
        str(len(scene.things)),
        [str(n) for n in range(1, MOST + 1) if n != len(scene.things)],
    )


def count_plus(scene: Scene, rng: Rng) -> Item:
    """Ask for the number of things plus 1, 2 or 3."""
    extra = int(rng.integers(1, 4))
    answer = len(scene.things) + extra
    return (
        f"What is the number of objects plus {extra}?",
        str(answer),
        [str(n + extra) for n in range(1, MOST + 1) if n + extra != answer],
    )


def corners_of(scene: Scene, rng: Rng) -> Item | None:
    """Ask for the corners of the only thing of its color; None if there is none."""
    thing = _pick(rng, _unique(scene, "color"))
    if thing is None:
        return None
    answer = CORNERS[thing.shape]
    return (
        f"How many corners does the {thing.color} object have?",
        str(answer),
        [str(n) for n in CORNERS.values() if n != answer],
    )


def which_object(scene: Scene, rng: Rng) -> Item:
    """Ask which of several things is in the picture."""
    there = _pick(rng, sorted(scene.names))
    wrong = [
        " ".join(KINDS[i])
        for i in rng.permutation(len(KINDS))
        if " ".join(KINDS[i]) not in scene.names
    ]
    return "Which object is in the picture?", there, wrong[:5]


def color_by_corners(scene: Scene, rng: Rng) -> Item | None:
    """Ask for the color of the only thing with its corners; None if there is none."""
    thing = _pick(rng, _unique(scene, "shape"))
    if thing is None:
        return None
    wrong = [c for c in COLORS if c != thing.color]
    return f"What color is the object with {CORNERS[thing.shape]} corners?", thing.color, wrong


ITEMS: dict[str, Callable[[Scene, Rng], Item | None]] = {
    function.__name__: function
    for function in (
        color_of,
        shape_of,
        count,
        count_plus,
        corners_of,
        which_object,
        color_by_corners,
    )
}


# --- questions that are true or false


def existence(scene: Scene, rng: Rng, category: str = "random") -> Claim:
    """Is a thing there? The absent one is chosen as POPE does for the category."""
    ask = "Is there {} in the image?"
    return ask.format(_a(_pick(rng, sorted(scene.names)))), ask.format(
        _a(_absent(scene, rng, category))
    )


def has_shape(scene: Scene, rng: Rng) -> Claim | None:
    """Is a shape there? None if all shapes are."""
    there = {thing.shape for thing in scene.things}
    if there == set(SHAPES):
        return None
    ask = "Is there a {} in the image?"
    return ask.format(_pick(rng, sorted(there))), ask.format(
        _pick(rng, sorted(set(SHAPES) - there))
    )


def has_color(scene: Scene, rng: Rng) -> Claim:
    """Is a color there?"""
    there = {thing.color for thing in scene.things}
    ask = "Is there {} object in the image?"
    return ask.format(_a(_pick(rng, sorted(there)))), ask.format(
        _a(_pick(rng, sorted(set(COLORS) - there)))
    )


def count_is(scene: Scene, rng: Rng) -> Claim:
    """Is this the number of things?"""
    right = len(scene.things)
    wrong = _pick(rng, [n for n in range(1, MOST + 1) if n != right])
    ask = "Is the number of objects in the image {}?"
    return ask.format(right), ask.format(wrong)


def color_is(scene: Scene, rng: Rng) -> Claim | None:
    """Is this the color of a thing? None as for `color_of`."""
    item = color_of(scene, rng)
    if item is None:
        return None
    noun = item[0].removeprefix("What color is ").removesuffix("?")
    return f"Is {noun} {item[1]}?", f"Is {noun} {_pick(rng, item[2])}?"


def has_corners(scene: Scene, rng: Rng) -> Claim | None:
    """Is a thing with so many corners there? None as for `has_shape`."""
    claim = has_shape(scene, rng)
    if claim is None:
        return None
    shapes = (
        question.removeprefix("Is there a ").removesuffix(" in the image?") for question in claim
    )
    yes, no = (f"Is there an object with {CORNERS[shape]} corners?" for shape in shapes)
    return yes, no


def count_plus_is(scene: Scene, rng: Rng) -> Claim:
    """Is this the number of things plus 1, 2 or 3?"""
    question, right, wrong = count_plus(scene, rng)
    ask = question.replace("What is", "Is").removesuffix("?") + " equal to {}?"
    return ask.format(right), ask.format(_pick(rng, wrong))


CLAIMS: dict[str, Callable[[Scene, Rng], Claim | None]] = {
    function.__name__: function
    for function in (
        existence,
        has_shape,
        has_color,
        count_is,
        color_is,
        has_corners,
        count_plus_is,
    )
}

# kind of question -> how its questions can be told from the others; the first that fits counts
_WORDINGS = {
    "color_by_corners": "What color is the object with",
    "color_of": "What color is",
    "shape_of": "What shape is",
    "count": "How many objects",
    "count_plus": "What is the number of objects plus",
    "corners_of": "How many corners",
    "which_object": "Which object",
    "has_corners": "Is there an object with",
    "has_color": f"Is there an? ({'|'.join(COLORS)}) object",
    "has_shape": f"Is there an? ({'|'.join(SHAPES)})",
    "existence": "Is there an?",
    "count_is": "Is the number of objects in the image",
    "count_plus_is": "Is the number of objects plus",
    "color_is": r"Is the \w+ \w+\?",
}


def kind_of(prompt: str) -> str:
    """The name of the ITEM or CLAIM whose question is in a prompt.

    Raises:
        ValueError: there is none.
    """
    for kind, wording in _WORDINGS.items():
        if re.search(wording, prompt):
            return kind
    raise ValueError(f"no question of the embedded suite: {prompt!r}")


# --- rows of the data sets
# `key` makes identifiers unique and chooses the category, so that the first n rows are balanced.

POPE_CATEGORIES = ("random", "popular", "adversarial")


# Which ITEMS and CLAIMS each data set asks; for MME, MMMU and MMStar by category. VQAv2 asks the
# items of GQA, MMBench those of ScienceQA.
GQA_ITEMS = ("color_of", "shape_of", "count", "corners_of")
GQA_CLAIMS = ("has_shape", "has_color", "color_is")
SCIENCEQA = ("color_of", "shape_of", "which_object", "count")
MME = {
    "existence": "existence",
    "count": "count_is",
    "color": "color_is",
    "commonsense_reasoning": "has_corners",
    "numerical_calculation": "count_plus_is",
}
MMMU = {
    "Math": ("count_plus", "corners_of"),
    "Art": ("color_of", "color_by_corners"),
    "Design": ("shape_of", "which_object"),
}
MMSTAR = (  # category, l2 category, item
    ("coarse perception", "image scene and topic", "which_object"),
    ("fine-grained perception", "recognition", "color_of"),
    ("instance reasoning", "single-instance reasoning", "shape_of"),
    ("logical reasoning", "common reasoning", "color_by_corners"),
    ("science & technology", "biology & chemistry & physics", "corners_of"),
    ("math", "numeric commonsense and calculation", "count_plus"),
    ("fine-grained perception", "object counting", "count"),
    ("math", "geometry", "corners_of"),
)
HINTS = {
    "color_of": "Every shape is painted in one color.",
    "shape_of": "A circle is round. A triangle has three corners. A square has four corners.",
    "count": "Gray strokes on the ground are not objects.",
}


def _options(rng: Rng, item: Item, most: int = 4) -> tuple[list[str], int]:
    """Shuffled options (the answer and at most `most` - 1 wrong ones), and the answer's index."""
    _, answer, wrong = item
    options = [answer, *(wrong[i] for i in rng.permutation(len(wrong))[: most - 1])]
    options = [options[i] for i in rng.permutation(len(options))]
    return options, options.index(answer)


def pope(scene: Scene, rng: Rng, key: int) -> list[Doc]:
    """Two documents of POPE: a thing that is there and one that is not."""
    category = POPE_CATEGORIES[key % len(POPE_CATEGORIES)]
    rows = zip(existence(scene, rng, category), ("yes", "no"), strict=True)
    return [
        {
            "id": f"{2 * key + i}",
            "question_id": f"{2 * key + i}",
            "question": question,
            "answer": answer,
            "category": category,
        }
        for i, (question, answer) in enumerate(rows)
    ]


def gqa(scene: Scene, rng: Rng, key: int) -> list[Doc]:
    """A document of GQA: three of five ask for a word, two for yes or no."""
    if key % 5 < 3:
        item = ITEMS[GQA_ITEMS[(key // 5 * 3 + key % 5) % len(GQA_ITEMS)]](scene, rng)
        asked = item and item[:2]
    else:
        claim = CLAIMS[GQA_CLAIMS[(key // 5 * 2 + key % 5 - 3) % len(GQA_CLAIMS)]](scene, rng)
        yes = bool(rng.integers(2))
        asked = claim and (claim[0], "yes") if yes else claim and (claim[1], "no")
    if not asked:
        return []
    question, answer = asked
    return [
        {
            "id": f"{key}",
            "question": question,
            "answer": answer,
            "fullAnswer": f"{answer.capitalize()}.",
            "isBalanced": True,
        }
    ]


def scienceqa(scene: Scene, rng: Rng, key: int) -> list[Doc]:
    """A document of ScienceQA: multiple choice, half of them with the hint of their kind."""
    name = SCIENCEQA[key % len(SCIENCEQA)]
    item = ITEMS[name](scene, rng)
    if item is None:
        return []
    choices, answer = _options(rng, item)
    hint = HINTS.get(name, "") if rng.integers(2) else ""
    return [
        {
            "question": item[0],
            "choices": choices,
            "answer": answer,
            "hint": hint,
            "task": "closed choice",
            "grade": "grade2",
        }
        | {
            "subject": "natural science",
            "topic": "shapes",
            "category": name,
            "skill": name,
            "lecture": "",
            "solution": "",
        }
    ]


def mme(scene: Scene, rng: Rng, key: int) -> list[Doc]:
    """Two documents of MME on one image: the answers are yes and no."""
    category = list(MME)[key % len(MME)]
    claim = CLAIMS[MME[category]](scene, rng)
    return [
        {
            "question_id": f"{category}/{key:06d}.png",
            "question": f"{question} Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for question, answer in zip(claim or (), ("Yes", "No"), strict=False)
    ]


def mmmu(scene: Scene, rng: Rng, key: int) -> list[Doc]:
    """A document of MMMU: multiple choice, or open for half of Math."""
    subject = list(MMMU)[key % len(MMMU)]
    item = ITEMS[_pick(rng, list(MMMU[subject]))](scene, rng)
    if item is None:
        return []
    question, answer, _ = item
    options, index = _options(rng, item)
    is_open = subject == "Math" and bool(rng.integers(2))
    return [
        {
            "id": f"validation_{subject}_{key}",
            "question": f"<image 1> {question}",
            "options": "[]" if is_open else repr(options),
        }
        | {
            "answer": answer if is_open else "ABCD"[index],
            "question_type": "open" if is_open else "multiple-choice",
        }
        | {
            "explanation": "",
            "img_type": "['Geometric Shapes']",
            "topic_difficulty": "Easy",
            "subfield": subject,
        }
    ]


def mmstar(scene: Scene, rng: Rng, key: int) -> list[Doc]:
    """A document of MMStar: multiple choice, with the options in the question."""
    category, l2_category, name = MMSTAR[key % len(MMSTAR)]
    item = ITEMS[name](scene, rng)
    if item is None:
        return []
    options, index = _options(rng, item)
    listed = ", ".join(
        f"{letter}: {option}" for letter, option in zip("ABCD", options, strict=False)
    )
    return [
        {
            "index": key,
            "question": f"{item[0]}\nOptions: {listed}",
            "answer": "ABCD"[index],
            "category": category,
            "l2_category": l2_category,
        }
    ]


def vqav2(scene: Scene, rng: Rng, key: int) -> list[Doc]:
    """A document of VQAv2: a question that asks for a word, with the answers of ten people.

    Up to three of the ten say something else.
    """
    item = ITEMS[GQA_ITEMS[key % len(GQA_ITEMS)]](scene, rng)
    if item is None:
        return []
    question, answer, wrong = item
    others = [_pick(rng, wrong) for _ in range(int(rng.integers(4)))]
    words = [answer] * (10 - len(others)) + others
    return [
        {
            "question_type": " ".join(question.split()[:2]).lower(),
            "multiple_choice_answer": answer,
            "answers": [
                {"answer": word, "answer_confidence": "yes", "answer_id": number}
                for number, word in enumerate(words, start=1)
            ],
            "answer_type": "number" if answer.isdigit() else "other",
            "question_id": key,
            "question": question,
        }
    ]


def mmbench(scene: Scene, rng: Rng, key: int) -> list[Doc]:
    """The documents of a circle of MMBench: a question and its options in every rotation.

    Half of the questions whose kind has a hint get it.
    """
    name = SCIENCEQA[key % len(SCIENCEQA)]
    item = ITEMS[name](scene, rng)
    if item is None:
        return []
    options, answer = _options(rng, item)
    hint = HINTS.get(name, "nan") if rng.integers(2) else "nan"
    return [
        {
            "index": key + rotation * 10**6,
            "question": item[0],
            "hint": hint,
            "answer": "ABCD"[(answer + rotation) % len(options)],
            **dict.fromkeys("ABCD", "nan"),
            **{
                letter: options[(place - rotation) % len(options)]
                for place, letter in enumerate("ABCD"[: len(options)])
            },
            "category": name,
            "source": "shapes",
            "L2-category": "attribute_reasoning",
            "comment": "nan",
            "split": "dev",
        }
        for rotation in range(len(options))
    ]


DOCUMENTS: dict[str, Callable[..., list[Doc]]] = {
    "pope": pope,
    "gqa": gqa,
    "scienceqa_img": scienceqa,
    "mme": mme,
    "mmmu_val": mmmu,
    "mmstar": mmstar,
    "vqav2": vqav2,
    "mmbench_en": mmbench,
}
