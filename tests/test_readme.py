"""README and pages: rows are those of the generated table, methods those of the registry."""

import re
from pathlib import Path

import pytest

from scripts.readme import README, TABLE, excerpt
from secateur.paths import ROOT
from secateur.pruners import REGISTRY, InLLMPruner

PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def block(name: str) -> str:
    return README.read_text().split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]


def test_the_rows_are_those_of_the_whole_table():
    assert block("table") == excerpt(TABLE.read_text())


def test_a_table_without_the_rows_is_refused():
    table = "\n".join(line for line in TABLE.read_text().splitlines() if "scope" not in line)
    with pytest.raises(ValueError, match="no row scope 16"):
        excerpt(table)


def test_every_method_has_its_row():
    rows = [line.strip("| ").split(" | ") for line in block("methods").splitlines()[2:]]
    assert {row[0].strip("`") for row in rows} == set(REGISTRY)
    assert f"{len(REGISTRY)} pruners" in README.read_text()
    for name, paper, idea, status in rows:
        cls = REGISTRY[name.strip("`")]
        number = cls.paper.removeprefix("arXiv ")
        assert paper == ("-" if number == "-" else f"[{number}](https://arxiv.org/abs/{number})")
        assert status == cls.status
        assert idea.startswith("inside: ") == issubclass(cls, InLLMPruner)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []
