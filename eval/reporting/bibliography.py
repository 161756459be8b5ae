"""BibTeX entries of the methods' papers."""

import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

from secateur.pruners import REGISTRY


@cache
def entries() -> dict[str, str]:
    """The entries of pruners/references.bib, by arXiv id."""
    text = files("secateur.pruners").joinpath("references.bib").read_text(encoding="utf-8")
    found = {}
    for entry in re.findall(r"^@.*?^}$", text, re.MULTILINE | re.DOTALL):
        (eprint,) = re.findall(r"eprint = \{(.*?)\}", entry)
        found[eprint] = entry
    return found


def key_of(method: str) -> str:
    """The key of a method's paper; empty if there is no entry."""
    entry = entries().get(REGISTRY[method].paper.removeprefix("arXiv "), "")
    return entry[entry.index("{") + 1 : entry.index(",")] if entry else ""


def bibliography(methods: Iterable[str]) -> str:
    """The entries of some methods, each paper once; comments name papers without an entry."""
    lines, papers = [], {name: REGISTRY[name].paper for name in sorted(set(methods))}
    for paper in dict.fromkeys(paper for paper in papers.values() if paper != "-"):
        names = ", ".join(name for name, own in papers.items() if own == paper)
        entry = entries().get(paper.removeprefix("arXiv "))
        lines.append(f"% {names}\n{entry}" if entry else f"% {names}: {paper}; add its entry")
    return "\n\n".join(lines) + "\n"
