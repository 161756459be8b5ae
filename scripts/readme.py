"""Put tables and pictures of the newest sweep of the embedded suite into the project.

    make sweep EXPERIMENT=shapes_all && make readme

Writes the whole table to results/shapes_all.md, its rows of `make sweep` at 16 tokens into the
README, and one picture per method of the tokens it keeps of the same POPE scene.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from transformers import AutoConfig

from secateur.families.base import View
from secateur.paths import ROOT, SHAPES_MODEL
from secateur.reporting.overlay import kept_tokens
from secateur.shapes.datasets import EVAL, SCHEMAS, documents
from secateur.shapes.scenes import make_scene
from secateur.store import read

TABLE = ROOT / "results" / "shapes_all.md"
README = ROOT / "README.md"
ROWS = (("none", "full"), *((m, "16") for m in ("random", "uniform", "fastervlm", "scope")))


def write_tables(table: str) -> None:
    """Write a sweep's accuracy table to results/shapes_all.md, and its `ROWS` into the README."""
    TABLE.write_text(f"# All methods on the embedded suite\n\n{table}")
    block = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)
    text = block.sub(lambda match: match[1] + excerpt(table) + match[2], README.read_text())
    README.write_text(text)


def excerpt(table: str) -> str:
    """Head and `ROWS` of a sweep's accuracy table.

    Raises:
        ValueError: the table lacks one of the rows.
    """
    lines = [line for line in table.splitlines() if line.startswith("|")]
    by_row = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in lines}
    if missing := [" ".join(row) for row in ROWS if row not in by_row]:
        raise ValueError(f"the table has no row {', '.join(missing)}; run `make sweep` first")
    return "\n".join([*lines[:2], *(by_row[row] for row in ROWS), ""])


def draw(results: Path) -> int:
    """Draw the tokens that each method keeps; returns the number of pictures."""
    # the first document of POPE with four things in its scene
    document = next(
        number
        for number, (seed, _) in enumerate(documents("pope", EVAL, 60))
        if len(make_scene(*seed).things) == 4
    )
    kept: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for path in (results / "runs" / "shapes" / "shapes_llava" / "pope").glob("*/record.json"):
        identity = read(path.parent).identity
        samples = pd.read_parquet(path.with_name("samples.parquet"))
        indices = samples.set_index("doc_id")["kept_indices"].to_dict()
        kept[identity.pruner.label][identity.budget] = tuple(indices[document][0])
    repository, _, split, _ = SCHEMAS["pope"]
    folder = str(results / "data" / "shapes" / repository)
    image = datasets.load_dataset(folder, split=split)[document]["image"]
    vision = AutoConfig.from_pretrained(SHAPES_MODEL).vision_config
    side = vision.image_size // vision.patch_size
    tokens = np.arange(side**2).reshape(side, side)

    def picture(kept: dict[str, tuple[int, ...]]) -> Figure:
        masks = {label: [np.isin(tokens, numbers)] for label, numbers in kept.items()}
        return kept_tokens([View(image, tokens)], masks)

    figures = ROOT / "results" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    smallest = {name: kept[name]["16"] for name in ("random", "scope")}
    picture(smallest).savefig(figures / "kept_tokens.png", dpi=110)
    for name, budgets in kept.items():
        by_size = dict(sorted(budgets.items(), key=lambda item: -len(item[1])))
        patches = {
            f"{name} {budget}": tuple(i for i in indices if i >= 0)
            for budget, indices in by_size.items()
        }
        stem = re.sub("[^a-z0-9]+", "_", name).strip("_")
        picture(patches).savefig(figures / f"{stem}.png", dpi=80)
    return len(kept) + 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    results = parser.parse_args().results
    tables = sorted((results / "tables").glob("shapes_*.md"), key=lambda path: path.stat().st_mtime)
    if not tables:
        parser.error(
            f"no table of the embedded suite in {results / 'tables'}; run "
            "`make sweep EXPERIMENT=shapes_all` first"
        )
    write_tables(tables[-1].read_text())
    print(f"{TABLE}, {README}: from {tables[-1]}")
    print(f"{draw(results)} pictures in results/figures")


if __name__ == "__main__":
    main()
