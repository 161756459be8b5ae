"""Train the embedded model: `python scripts/train_shapes.py FOLDER` (`make train-shapes`). Takes about an hour on two cores."""

import argparse
import logging
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="where model, processor and recipe.json go; must not exist"
    )
    folder = parser.parse_args().folder
    if folder.exists():
        parser.error(f"{folder} exists; name a new folder")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    from secateur.shapes.datasets import build
    from secateur.shapes.training import Recipe, train
    from secateur.tasks import TASKS, load_tasks

    data = build(Path("results/data/shapes"))
    train(Recipe(), load_tasks(list(TASKS), data), folder)


if __name__ == "__main__":
    main()
