"""Tiny data sets in the columns, configurations and files of the true repositories.

Their images have every kind that the true ones have, and some that break readers: CMYK, a palette
with transparency, 16 bits, a rotation in EXIF, one pixel.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Pillow

Row = dict[str, Any]
Tables = Mapping[str, tuple[list[Row], Features]]  # "configuration/split" -> rows, columns
KINDS = ("RGB", "RGBA", "P", "L", "CMYK", "turned", "LA", "16 bits", "1", "GIF", "WEBP", "dot")
_text, _image = Value("string"), Image()


def picture(kind: str, number: int = 0) -> dict[str, Any]:
    """An image as `datasets` stores it."""
    random = np.random.default_rng(number)
    size = (1, 1, 3) if kind == "dot" else (48, 64, 3)
    image = Pillow.fromarray(random.integers(0, 255, size, dtype=np.uint8))
    form, options = "PNG", {}
    if kind in ("RGB", "CMYK", "turned"):
        form = "JPEG"
    if kind in ("GIF", "WEBP"):
        form = kind
    if kind in ("RGBA", "P", "L", "CMYK", "LA", "1"):
        image = image.convert(kind)
    if kind == "P":
        options = {"transparency": 3}
    if kind == "16 bits":
        image = Pillow.fromarray(random.integers(0, 65535, (48, 64), dtype=np.uint16))
    if kind == "turned":
        exif = Pillow.Exif()
        exif[0x0112] = 6
        options = {"exif": exif}
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return {"bytes": stream.getvalue(), "path": None}


def _columns(names: str, **others: Any) -> Features:
    return Features({**dict.fromkeys(names.split(), _text), **others})


def write(folder: Path, tables: Tables, shards: int = 1) -> None:
    """Parquet files, and the card that tells `load_dataset` the configurations and splits."""
    card = ["---", "configs:"]
    last = ""
    for name, (rows, features) in tables.items():
        config, split = name.split("/")
        table = Dataset.from_list(rows, features=features)
        (folder / config).mkdir(parents=True, exist_ok=True)
        for shard in range(shards):
            file = folder / config / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            table.shard(shards, shard, contiguous=True).to_parquet(file)
        card += [f"- config_name: {config}", "  data_files:"] if config != last else []
        card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
        last = config
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def pope(count: int = 12, kinds: tuple[str, ...] = KINDS) -> Tables:
    """Ids of questions begin anew in every category, as in the true data set."""
    things, groups = ("dog", "car", "café"), ("adversarial", "popular", "random")
    rows = [
        {
            "id": str(number),
            "question_id": str(number // 3),
            "question": f"Is there a {things[number % 3]} in the image?",
            "answer": ("yes", "no")[number % 2],
            "image_source": f"COCO_val2014_{number:012d}",
            "image": picture(kinds[number % len(kinds)], number),
            "category": groups[number % 3],
        }
        for number in range(count)
    ]
    names = "id question_id question answer image_source category"
    features = _columns(names, image=_image)
    parts = {f"Full/{one}": ([r for r in rows if r["category"] == one], features) for one in groups}
    return {"default/test": (rows, features), **parts}


def scienceqa(count: int = 6) -> Tables:
    """Two to five choices; some questions have no hint."""
    names = "question hint task grade subject topic category skill lecture solution"
    rows = [
        {
            **dict.fromkeys(names.split(), "some text"),
            "question": f"Which of these is thing {number}?",
            "hint": "Look at the image." if number % 2 else "",
            "choices": ["one", "two", "three", "four", "five"][: 2 + number % 4],
            "answer": number % 2,
            "image": picture(KINDS[number % len(KINDS)], number),
        }
        for number in range(count)
    ]
    features = _columns(names, choices=Sequence(_text), answer=Value("int8"), image=_image)
    return {"ScienceQA-IMG/train": (rows[:2], features), "ScienceQA-IMG/test": (rows, features)}


def gqa(count: int = 6) -> Tables:
    """Images stand in a configuration of their own."""
    rows = [
        {
            "id": f"2026{number}",
            "imageId": f"n{number % 3}",
            "question": f"What color is object {number}?",
            "answer": ("red", "yes")[number % 2],
            "fullAnswer": "It is red.",
            "isBalanced": True,
            "groups": {"global": None, "local": "06-x"},
            "types": {"structural": "query", "semantic": "attr", "detailed": "x"},
            "semantic": [{"operation": "select", "argument": "x", "dependencies": [0]}],
        }
        for number in range(count)
    ]
    features = _columns(
        "id imageId question answer fullAnswer",
        isBalanced=Value("bool"),
        groups={"global": _text, "local": _text},
        types={"structural": _text, "semantic": _text, "detailed": _text},
        semantic=[
            {"operation": _text, "argument": _text, "dependencies": Sequence(Value("int32"))}
        ],
    )
    images = [{"id": f"n{number}", "image": picture(KINDS[number], number)} for number in range(3)]
    return {
        "testdev_balanced_instructions/testdev": (rows, features),
        "testdev_balanced_images/testdev": (images, Features({"id": _text, "image": _image})),
    }


def mme(count: int = 4) -> Tables:
    """Two questions for every image."""
    groups = ("existence", "OCR", "code_reasoning", "celebrity")
    rows = [
        {
            "question_id": f"{groups[number % 4]}/{number}.png",
            "image": picture(KINDS[number % len(KINDS)], number),
            "question": f"Is this a {words}? Please answer yes or no.",
            "answer": answer,
            "category": groups[number % 4],
        }
        for number in range(count)
        for words, answer in (("sign", "Yes"), ("dog", "No"))
    ]
    return {"default/test": (rows, _columns("question_id question answer category", image=_image))}


def mmmu(count: int = 6) -> Tables:
    """Several images, images as options, open questions, quotes in options."""
    names = "id question options answer question_type explanation img_type topic_difficulty"
    names += " subfield"
    features = _columns(names, **{f"image_{number}": _image for number in range(1, 8)})

    def row(number: int, split: str) -> Row:
        shown, choice = (1, 2, 1, 1, 4, 1)[number % 6], number % 4 != 3
        options = ["cat", "it's a dog", 'a "fish"', "bird"]
        if number == 4:
            options = ["<image 2>", "<image 3>", "<image 4>"]
        body = " ".join(f"<image {k}>" for k in range(1, 1 + (1 if number == 4 else shown)))
        own = {
            "id": f"{split}_{('Art', 'Accounting', 'Math')[number % 3]}_{number}",
            "question": f"{body} What is shown?",
            "options": str(options) if choice else "[]",
            "answer": "B" if choice else "['6', '6.0']",
            "question_type": "multiple-choice" if choice else "open",
        }
        images = {f"image_{k}": picture(KINDS[k], k) if k <= shown else None for k in range(1, 8)}
        return {**dict.fromkeys(names.split(), ""), **own, **images}

    return {
        f"default/{split}": ([row(number, split) for number in range(size)], features)
        for split, size in (("dev", 2), ("validation", count))
    }


def mmstar(count: int = 6) -> Tables:
    """Six categories, with the options inside the question."""
    groups = "coarse perception,math,logical reasoning,instance reasoning,science & technology"
    categories = [*groups.split(","), "fine-grained perception"]
    rows = [
        {
            "index": number,
            "question": f"Which describes {number}?\nOptions: A: x, B: y, C: z, D: w",
            "image": picture(KINDS[number % len(KINDS)], number),
            "answer": "ABCD"[number % 4],
            "category": categories[number % 6],
            "l2_category": "diagram reasoning",
            "meta_info": {"source": "MMBench", "split": "val", "image_path": "x.jpg"},
        }
        for number in range(count)
    ]
    features = _columns(
        "question answer category l2_category",
        index=Value("int64"),
        image=_image,
        meta_info={"source": _text, "split": _text, "image_path": _text},
    )
    return {"val/val": (rows, features)}
