"""Put the accuracy table of the shipped sweep and the picture of kept tokens into the README (`make readme`).

The table is what `make sweep` wrote; the picture is drawn from the same sweep's records, on the first POPE scene.
"""

import argparse
import re
from pathlib import Path

import datasets

from eval.overlay import kept_tokens
from eval.shapes.datasets import SCHEMAS
from eval.shapes.training import SIDE
from eval.store import Store
from eval.tables import label

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    results = parser.parse_args().results

    tables = sorted((results / "tables").glob("shapes_*.md"), key=lambda path: path.stat().st_mtime)
    if not tables:
        parser.error(f"no table of the shapes suite in {results / 'tables'}; run `make sweep` first")
    readme = ROOT / "README.md"
    block = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)
    readme.write_text(block.sub(lambda m: m[1] + tables[-1].read_text() + m[2], readme.read_text()))

    document = 4  # of POPE: a scene of several things
    repository, _, split, _ = SCHEMAS["pope"]
    image = datasets.load_dataset(str(results / "data" / "shapes" / repository), split=split)[document]["image"]
    kept = {}
    for path in sorted((results / "runs" / "shapes" / "shapes_llava" / "pope").glob("*_16_*/record.json")):
        rows = Store.samples(path.parent).set_index("doc_id")
        kept[label(Store.read(path.parent)["identity"]["pruner"])] = tuple(rows.loc[document, "kept_indices"][0])
    figure = kept_tokens(image, kept, (SIDE, SIDE))
    target = results / "figures" / "kept_tokens.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    print(f"README.md: table of {tables[-1].name}; {target}: {', '.join(kept)}")


if __name__ == "__main__":
    main()
