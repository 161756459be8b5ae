"""Write the data sets of the suite as parquet folders, under the names that the tasks load."""

import io
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from datasets import Dataset, Features, Image, Sequence, Value
from filelock import FileLock

from secateur.shapes.questions import DOCUMENTS, Doc
from secateur.shapes.scenes import make_scene, render

VERSION = 2  # part of the data's identity: raise it with any change to scenes or questions
# The first number of every scene's seed: no evaluation scene is a training scene.
TRAIN, EVAL = 0, 1
# The tasks of `make sweep`, over which the means on the embedded model's card are.
SWEEP_TASKS = ("pope", "scienceqa_img", "gqa", "mme", "mmmu_val", "mmstar")
# Documents per task, and calls of its builder per scene. So POPE asks six questions per image, GQA
# and VQAv2 five, MMBench four, which are one question, MME two, the others one.
SIZES = {
    "pope": (300, 3),
    "gqa": (300, 5),
    "scienceqa_img": (240, 1),
    "mme": (240, 1),
    "mmmu_val": (240, 1),
    "mmstar": (240, 1),
    "vqav2": (240, 5),
    "mmbench_en": (240, 1),
}

_text, _image = Value("string"), Image()


def _columns(names: str) -> dict:
    return dict.fromkeys(names.split(), _text)


_SCIENCE = "question hint task grade subject topic category skill lecture solution"
_MMMU = "id question options answer question_type explanation img_type topic_difficulty subfield"
# task -> (name of the data set on the hub, configuration, split, columns)
SCHEMAS: dict[str, tuple[str, str, str, Features]] = {
    "pope": (
        "lmms-lab-encoder/POPE",
        "default",
        "test",
        Features(
            {**_columns("id question_id question answer image_source category"), "image": _image}
        ),
    ),
    "gqa": (
        "lmms-lab-encoder/GQA",
        "testdev_balanced_instructions",
        "testdev",
        Features(
            {**_columns("id imageId question answer fullAnswer"), "isBalanced": Value("bool")}
        ),
    ),
    "scienceqa_img": (
        "lmms-lab-encoder/ScienceQA",
        "ScienceQA-IMG",
        "test",
        Features(
            {
                **_columns(_SCIENCE),
                "choices": Sequence(_text),
                "answer": Value("int8"),
                "image": _image,
            }
        ),
    ),
    "mme": (
        "lmms-lab-encoder/MME",
        "default",
        "test",
        Features({**_columns("question_id question answer category"), "image": _image}),
    ),
    "mmmu_val": (
        "lmms-lab-encoder/MMMU",
        "default",
        "validation",
        Features({**_columns(_MMMU), **{f"image_{i}": _image for i in range(1, 8)}}),
    ),
    "mmstar": (
        "Lin-Chen/MMStar",
        "default",
        "val",
        Features(
            {
                **_columns("question answer category l2_category"),
                "index": Value("int64"),
                "image": _image,
                "meta_info": _columns("source split image_path"),
            }
        ),
    ),
    "vqav2": (
        "lmms-lab-encoder/VQAv2",
        "default",
        "validation",
        Features(
            {
                **_columns("question_type multiple_choice_answer answer_type question"),
                "answers": [{**_columns("answer answer_confidence"), "answer_id": Value("int64")}],
                "image_id": Value("int64"),
                "question_id": Value("int64"),
                "image": _image,
            }
        ),
    ),
    "mmbench_en": (
        "lmms-lab-encoder/MMBench",
        "en",
        "dev",
        Features(
            {
                **_columns("question hint answer A B C D category source L2-category comment"),
                "split": _text,
                "index": Value("int64"),
                "image": _image,
            }
        ),
    ),
}
# GQA keeps its images in a table of their own: (configuration, columns)
GQA_IMAGES = ("testdev_balanced_images", Features({"id": _text, "image": _image}))


def documents(task: str, split: int, count: int) -> Iterator[tuple[tuple[int, ...], Doc]]:
    """The first `count` documents of a task, as (seed of the scene, document without its image)."""
    task_number, keys_per_scene = list(SIZES).index(task), SIZES[task][1]
    made = 0
    for key in itertools.count():
        # if a scene does not allow the question, try the next scene: the order of categories stays
        for attempt in itertools.count():
            seed = (split, task_number, key // keys_per_scene, attempt)
            docs = DOCUMENTS[task](make_scene(*seed), np.random.default_rng([*seed, 2, key]), key)
            if docs:
                break
        for doc in docs:
            if made == count:
                return
            yield seed, doc
            made += 1


@lru_cache(maxsize=64)  # documents of one scene follow one another
def _picture(seed: tuple[int, ...]) -> dict[str, bytes | None]:
    """A scene's image as `datasets` stores it; encoded once for all documents of the scene."""
    png = io.BytesIO()
    render(make_scene(*seed)).save(png, format="PNG")
    return {"bytes": png.getvalue(), "path": None}


def _rows(task: str, count: int) -> tuple[list[Doc], list[Doc]]:
    """The first `count` rows of a task, and for GQA the rows of its images table."""
    rows: list[Doc] = []
    images: dict[str, Doc] = {}
    for seed, doc in documents(task, EVAL, count):
        name, image = "-".join(map(str, seed)), _picture(seed)
        if task == "gqa":
            images.setdefault(name, {"id": name, "image": image})
            rows.append(doc | {"imageId": name})
        elif task == "mmmu_val":
            rows.append(doc | {"image_1": image} | {f"image_{i}": None for i in range(2, 8)})
        elif task == "mmstar":
            rows.append(
                doc
                | {
                    "image": image,
                    "meta_info": {"source": "shapes", "split": "val", "image_path": f"{name}.png"},
                }
            )
        else:
            named: dict[str, Doc] = {
                "pope": {"image_source": name},
                "vqav2": {"image_id": 1000 * seed[2] + seed[3]},
            }
            rows.append(doc | {"image": image} | named.get(task, {}))
    return rows, list(images.values())


def _write(folder: Path, tables: dict[str, tuple[str, Dataset]]) -> None:
    """Write parquet files, and the card that tells `load_dataset` configurations and splits."""
    lines = ["---", "configs:"]
    for name, (split, table) in tables.items():
        path = f"{name}/{split}-00000-of-00001.parquet"
        (folder / name).mkdir(parents=True)
        table.to_parquet(folder / path)
        lines += [
            f"- config_name: {name}",
            "  data_files:",
            f"  - split: {split}",
            f"    path: {path}",
        ]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def build(root: Path, counts: Mapping[str, int] = MappingProxyType({})) -> Path:
    """Generate the suite in the folder `root`, unless this version of it is there; return `root`.

    The folder is built under another name and then renamed, by one process at a time, so that no
    process reads a part of it.

    Args:
        counts: task -> number of documents, instead of the number in SIZES.
    """
    sizes = {task: (counts.get(task, count), keys) for task, (count, keys) in SIZES.items()}
    stamp = json.dumps({"version": VERSION, "sizes": sizes})
    marker = root / "shapes.json"
    root.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(root.with_suffix(".lock")),
        tempfile.TemporaryDirectory(dir=root.parent) as scratch,
    ):
        if marker.exists() and marker.read_text() == stamp:
            return root
        new = Path(scratch) / "new"
        for task, (repository, config, split, features) in SCHEMAS.items():
            rows, images = _rows(task, sizes[task][0])
            tables = {config: (split, Dataset.from_list(rows, features=features))}
            if images:
                tables[GQA_IMAGES[0]] = (split, Dataset.from_list(images, features=GQA_IMAGES[1]))
            _write(new / repository, tables)
        (new / "shapes.json").write_text(stamp)
        if root.exists():
            shutil.rmtree(root)
        new.rename(root)
    return root
