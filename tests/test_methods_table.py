"""The generated table of methods is up to date and leaves nobody out."""

from scripts.methods_table import TABLE, table
from secateur.pruners import REGISTRY


def test_table_is_up_to_date() -> None:
    assert TABLE.read_text() == table(), "run: python scripts/methods_table.py"


def test_every_method_has_a_row() -> None:
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    for name in REGISTRY:
        assert sum(line.startswith(f"| `{name}` |") for line in rows) == 1
    assert sum("visa (absent)" in line for line in rows) == 1
