"""Pictures of kept tokens as files."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from secateur.reporting import comparison, images, tables
from secateur.reporting.kept import kept_documents
from secateur.reporting.overlay import kept_tokens
from secateur.reporting.paper import save


def draw(
    results: Path,
    out: Path,
    documents: Sequence[tuple[str, int]] = (),
    methods: Sequence[str] = (),
    data_root: Path | None = None,
) -> Iterator[Path]:
    """Draw what methods keep of documents, one PDF and one PNG per document and budget.

    Args:
        documents: (task, document) pairs; none: the first document of every task.
        methods: names of methods; none: all.
        data_root: folder with the data sets of suites other than shapes; None means the hub.

    Raises:
        ValueError: no finished cells of these methods; a document that a cell did not answer; a
            document whose tokens have no known place.
        FileNotFoundError: a data set is not there.
    """
    cells = [cell for cell in comparison.load(results) if cell.name != "none"]
    known = sorted({cell.name for cell in cells})
    if unknown := [name for name in methods if name not in known]:
        raise ValueError(f"no cells of {', '.join(unknown)}; there are {', '.join(known)}")
    cells = [cell for cell in cells if not methods or cell.name in methods]
    if not cells:
        raise ValueError(f"no finished cells of a method in {results / 'runs'}")
    groups = comparison.settings(cells)
    stems = tables.stems([[cell.record for cell in group] for group in groups])
    out.mkdir(parents=True, exist_ok=True)
    for group, stem in zip(groups, stems, strict=True):
        identity = group[0].record.identity
        root = results / "data" / "shapes" if identity.suite.name == "shapes" else data_root
        own = sorted({cell.task for cell in group})
        source = images.Documents(identity.suite.name, own, root.resolve() if root else None)
        for one in kept_documents(group, results, source, documents):
            for budget, masks in one.masks.items():
                caption = f"{one.task}, document {one.document}, budget {budget}, {identity.title}"
                figure = kept_tokens(one.views, masks, caption)
                name = f"{stem}_{one.task}_{one.document}_{budget}"
                path = out / (re.sub("[^A-Za-z0-9_.]+", "-", name) + ".pdf")
                yield from save(figure, path)
