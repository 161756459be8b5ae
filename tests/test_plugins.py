"""Methods from outside the project: from a file, and from a package with an entry point."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.pruners import REGISTRY, PrunerError, build, plugins
from secateur.pruners.plugins import load_plugins
from secateur.testing import check_pruner

ROOT = Path(__file__).resolve().parents[1]
METHOD = """
from dataclasses import dataclass
from secateur.pruners import ScoreTopK, Selection, VisualTokens
from secateur.pruners.registry import register

@register("{name}")
@dataclass(frozen=True)
class Mine(ScoreTopK):
    {fields}
    paper = "-"
    status = "official"

    def score(self, tokens: VisualTokens):
        return {score}
"""


def write(folder: Path, name: str, fields="", score="tokens.features.norm(dim=-1)") -> Path:
    path = folder / f"{name}.py"
    path.write_text(METHOD.format(name=name, fields=fields, score=score))
    return path


@pytest.fixture(autouse=True)
def only_here():
    """What a test registers is gone after it."""
    before = dict(REGISTRY)
    yield
    for name in REGISTRY.keys() - before.keys():
        del REGISTRY[name]
    plugins._loaded.clear()


def test_a_file_registers_its_methods_once(tmp_path):
    path = write(tmp_path, "mine", "alpha: float = 1.0")
    assert load_plugins([path]) == load_plugins(f"[{path}]") == ["mine"]
    pruner = build("mine", alpha=2)
    assert pruner.alpha == 2.0
    check_pruner(pruner)
    with pytest.raises(PrunerError, match="'mine' has no option beta; its options: alpha"):
        build("mine", beta=1)


def test_the_file_counts_in_the_digest_and_a_comment_elsewhere_does_not(tmp_path):
    first, second, same = (tmp_path / name for name in ("first", "second", "same"))
    digests = []
    for folder, score in ((first, "tokens.features[..., 0]"), (same, "tokens.features[..., 0]"),
                          (second, "tokens.features[..., 1]")):  # fmt: skip
        folder.mkdir()
        load_plugins([write(folder, "mine", score=score)])
        digests.append(REGISTRY.pop("mine").code)
    assert digests[0] == digests[1] != digests[2]


def test_a_package_registers_by_its_entry_point_and_all_its_modules_count(tmp_path):
    package, info = tmp_path / "their_package", tmp_path / "their_package-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("")
    (package / "maths.py").write_text("POWER = 1\n")
    path = write(package, "theirs", score="tokens.features.norm(dim=-1) ** POWER")
    path.write_text("from .maths import POWER\n" + path.read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[secateur.pruners]\nany = their_package.theirs\n")
    code = (
        "from secateur import build; from secateur.testing import check_pruner\n"
        "pruner = build('theirs'); check_pruner(pruner); print(pruner, pruner.code)"
    )

    def run() -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-B", "-c", code]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    before = run()
    assert before.startswith("Mine() ")
    (package / "maths.py").write_text("POWER = 2.5\n")
    assert run() != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_there", "it cannot be imported: ModuleNotFoundError: .* (line 1)"),
        ("import beside", "A plug-in is one file; put several files into a package"),
        ("x = (", "it cannot be imported: SyntaxError"),
        ("x = 1", 'registers no method; write @register("my_name") above its class'),
        (METHOD.format(name="scope", fields="", score="0"), "two pruners are called 'scope'"),
        (METHOD.format(name="mine", fields="alpha: float", score="0"),
         "the fields of 'mine' need defaults, and these have none: alpha"),
        (METHOD.format(name="mine", fields="alpha: float = 'a'", score="0"),
         "pruner 'mine': alpha='a': Input should be a valid number"),
        (METHOD.format(name="Mine!", fields="", score="0"), "must be small letters, digits and _"),
        (METHOD.format(name="mine", fields="", score="0").replace("@dataclass(frozen=True)\n", ""),
         "is no dataclass; write @dataclass"),
        (METHOD.format(name="mine", fields="", score="0").replace('"official"', '"good"'),
         "the status of 'mine' is 'good', which is none of 'official'"),
        (METHOD.format(name="mine", fields="", score="0").replace('    paper = "-"\n', ""),
         "the class of 'mine' lacks a line such as paper ="),
        (METHOD.format(name="mine", fields="needs = {'colour'}", score="0"),
         "'mine' needs colour, which nobody provides; there are "),
    ],
)  # fmt: skip
def test_a_plugin_that_is_wrong_is_one_paragraph_and_registers_nothing(tmp_path, text, message):
    path = tmp_path / "plugin.py"
    path.write_text(text)
    (tmp_path / "beside.py").write_text("")
    before = set(REGISTRY)
    with pytest.raises(PrunerError) as error:
        load_plugins([path])
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), str(error.value))
    assert str(error.value).startswith(f"plugins: {path}: ")
    assert "\n" not in str(error.value) or "SyntaxError" in str(error.value)
    assert set(REGISTRY) == before


def test_a_missing_file_is_named():
    with pytest.raises(PrunerError, match=r"plugins: there is no file /nowhere/mine\.py"):
        load_plugins(["/nowhere/mine.py"])


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("return tokens.features", "select() returned a Tensor, expected a Selection"),
        ("return Selection(torch.zeros(len(tokens.features), keep).long())", "more than once"),
        ("return Selection.ordered(top(tokens, keep + 1), False)", "tokens per image, expected"),
        ("return Selection.ordered(torch.randn(tokens.shape).topk(keep).indices, False)",
         "the same input, another answer"),
        ("tokens.features.zero_(); return Selection.ordered(top(tokens, keep), False)",
         "select() changes its input features"),
        ("return Selection.ordered(top(tokens, keep)[:1].expand(len(tokens.features), -1), False)",
         "image 1 of a batch of 3 gets another answer than alone"),
        ("self.fail('no budget is right')", "refuses every budget below the number of tokens"),
    ],
)  # fmt: skip
def test_the_public_check_finds_what_is_wrong(tmp_path, select, message):
    path = write(tmp_path, "mine")
    helper = (
        "\ndef top(tokens, keep):\n    return tokens.features.norm(dim=-1).topk(keep).indices\n"
    )
    body = f"\n    def select(self, tokens, keep):\n        {select}\n"
    path.write_text("import torch\n" + path.read_text() + body + helper)
    load_plugins([path])
    with pytest.raises((AssertionError, PrunerError)) as error:
        check_pruner(build("mine"))
    assert message in str(error.value)


def test_the_recipe_of_contributing_works_from_an_empty_folder(tmp_path, shapes):
    """Performs the section on methods outside the repository, with nothing else in the folder."""
    whole = (ROOT / "CONTRIBUTING.md").read_text()
    text = whole.split("# A method of your own")[1].split("# Add a task")[0]
    files = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, re.DOTALL))
    assert set(files) == {"mine.py", "mine_inside.py", "test_mine.py"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        ended = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True,
            text=True, timeout=280,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    assert "2 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py")
    (sweep,) = re.findall(r"^python ~/secateur/(scripts/sweep.py .*)$", text, re.MULTILINE)
    words = [str(ROOT / word) if word.startswith("scripts") else word for word in sweep.split()]
    small = ["tasks=[gqa]", "limit=6", f"suite.data_root={shapes}"]
    printed = run(*words, *small)
    assert "draw no random numbers and run once" in printed
    for row in ("none", "random", "mine alpha=2.0", "mine_inside"):
        assert f" {row} " in printed
    records = [json.loads(path.read_text()) for path in tmp_path.rglob("record.json")]
    mine = [r["identity"]["pruner"] for r in records if r["identity"]["pruner"]["name"] == "mine"]
    assert {own["alpha"] for own in mine} == {0.5, 1.0, 2.0}
    assert all(len(own["source"]) == 12 for own in mine)
    assert all(record["flops"]["pruner"] for record in records
               if record["identity"]["pruner"]["name"].startswith("mine"))  # fmt: skip
    assert list((tmp_path / "results" / "tables").glob("*_mine_alpha.pdf"))
