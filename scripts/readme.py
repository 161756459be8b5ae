"""Put the sweep's accuracy table and its pictures of kept tokens into the project (`make readme`).

The table is the newest of the shapes suite that a sweep wrote; the pictures are drawn from the same suite's records: one of
random and SCOPE for the README, and one a method, on the same POPE scene.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path

import datasets

from secateur.paths import ROOT
from secateur.reporting.overlay import kept_tokens
from secateur.reporting.tables import label
from secateur.shapes.datasets import EVAL, SCHEMAS, documents
from secateur.shapes.scenes import make_scene

from secateur.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    results = parser.parse_args().results

    tables = sorted((results / "tables").glob("shapes_*.md"), key=lambda path: path.stat().st_mtime)
    if not tables:
        parser.error(
            f"no table of the shapes suite in {results / 'tables'}; run `make sweep` first"
        )
    readme = ROOT / "README.md"
    block = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)
    readme.write_text(
        block.sub(lambda match: match[1] + tables[-1].read_text() + match[2], readme.read_text())
    )
    print(f"README.md: the table of {tables[-1]}")

    # POPE's first document about a full scene
    document = next(
        i
        for i, (seed, _) in enumerate(documents("pope", EVAL, 60))
        if len(make_scene(*seed).things) == 4
    )
    kept: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for path in (results / "runs" / "shapes" / "shapes_llava" / "pope").glob("*/record.json"):
        identity = Store.read(path.parent)["identity"]
        indices = Store.samples(path.parent).set_index("doc_id")["kept_indices"].to_dict()
        kept[label(identity["pruner"])][identity["budget"]] = tuple(indices[document][0])
    repository, _, split, _ = SCHEMAS["pope"]
    image = datasets.load_dataset(str(results / "data" / "shapes" / repository), split=split)[
        document
    ]["image"]
    figures = ROOT / "results" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    smallest = {name: kept[name]["16"] for name in ("random", "scope")}
    kept_tokens(image, smallest, (12, 12)).savefig(figures / "kept_tokens.png", dpi=110)
    for name, budgets in kept.items():
        by_size = dict(sorted(budgets.items(), key=lambda item: -len(item[1])))
        patches = {
            f"{name} {budget}": tuple(i for i in indices if i >= 0)
            for budget, indices in by_size.items()
        }
        kept_tokens(image, patches, (12, 12)).savefig(
            figures / f"{re.sub('[^a-z0-9]+', '_', name).strip('_')}.png", dpi=80
        )
    print(f"{figures}: {len(kept) + 1} pictures")


if __name__ == "__main__":
    main()
