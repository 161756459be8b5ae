"""Entries for the image tasks of lmms-eval that the table of tasks does not list.

A task is found by its name among the YAML files of lmms-eval, or of a local folder
(`suite.include_path`). All that its files can tell is checked here, without lmms-eval, whose import
takes seconds, and before any model is loaded.
"""

import ast
import difflib
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from secateur.tasks import TASKS, Sample, Task, canonical
from secateur.tasks.metrics import accuracy

SUBMISSION = "submission"  # lmms-eval's metric that only writes a file for a server
KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")  # either lets lmms-eval ask a judge
_JUDGE = re.compile(r"API_KEY|[Oo]pen_?[Aa][Ii]|requests\.post|get_chat_response|llm_judge")
_NAME = re.compile(r"""^(task|group):[ ]*["']?([\w.-]+)["']?[ ]*(?:#.*)?$""", re.MULTILINE)
_NUMBER = (int, float)


class _Function(str):
    """A function that a YAML file names, as "module.function".

    Attributes:
        folder: of the YAML file.
    """

    folder: Path


def find(name: str, include_path: Path | None) -> Task:
    """The entry of a task.

    Args:
        name: in the table of tasks, of lmms-eval, or of a YAML file below `include_path`.

    Raises:
        ValueError: no task or more than one has the name, or it is one that cannot be run here: of
            another output type, of videos, with sampled answers, or with a judge and no key.
    """
    local = _local(include_path) if include_path else {}
    if canonical(name) in TASKS:
        if name in local:
            raise ValueError(
                f"two tasks have the name {name}: the one of {local[name][0]} and the one of the "
                "table of tasks; rename yours"
            )
        return TASKS[canonical(name)]
    return _found(name, include_path)


def definition_folder() -> Path:
    """lmms-eval's folder of tasks."""
    spec = importlib.util.find_spec("lmms_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tasks"


def _local(include_path: Path) -> Mapping[str, list[Path]]:
    if not include_path.is_dir():
        raise ValueError(f"suite.include_path={include_path} is no folder")
    return _files(include_path.resolve())[0]


@cache
def _files(root: Path) -> tuple[dict[str, list[Path]], dict[str, Path]]:
    """The YAML files below a folder: of tasks by name, and of groups by name."""
    tasks: dict[str, list[Path]] = {}
    groups: dict[str, Path] = {}
    for path in sorted(root.rglob("*.yaml")):
        names = dict(_NAME.findall(path.read_text(encoding="utf-8")))
        if "group" in names:
            groups[names["group"]] = path
        elif "task" in names:
            tasks.setdefault(names["task"], []).append(path)
    return tasks, groups


@cache
def _found(name: str, include_path: Path | None) -> Task:
    tasks, groups = _files(definition_folder())
    local = _local(include_path) if include_path else {}
    paths = [*local.get(name, []), *tasks.get(name, [])]
    if not paths:
        raise ValueError(_unknown(name, {*TASKS, *tasks, *local}, groups))
    if len(paths) > 1:
        raise ValueError(
            f"two tasks have the name {name}: {paths[0]} and {paths[1]}; rename one of them"
        )
    config = _config(paths[0])
    _check(name, config)
    listed = [str(metric["metric"]) for metric in _metrics(config)]
    scored = [metric for metric in listed or ["exact_match"] if metric != SUBMISSION]
    filters = config.get("filter_list") or [{"name": "none"}]
    suffix = "" if filters[0]["name"] == "none" else f",{filters[0]['name']}"

    def score(sample: Sample) -> float:
        value = sample.get(scored[0]) if scored else None
        return float(value) if isinstance(value, _NUMBER) else float("nan")

    return Task(
        name=name,
        title=name,
        folder=str(paths[0].parent),
        dataset=str(config["dataset_path"]),
        documents=None,
        metrics={scored[0]: accuracy(scored[0] + suffix, suffix=scored[0])} if scored else {},
        score=score,
        image_hash=True,
        listed=False,
        judge=asks_judge(config),
        definition=_digest(paths[0]),
    )


def _unknown(name: str, known: set[str], groups: Mapping[str, Path]) -> str:
    """Why a name is no task, with names that are."""
    if name in groups:
        config = yaml.load(groups[name].read_text(encoding="utf-8"), _Loader)
        parts = config.get("task")
        names = [one if isinstance(one, str) else str(one.get("task")) for one in parts or []]
        return f"{name} is a group of tasks; name some of them: tasks=[{','.join(names)}]"
    nearest = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.5)
    return (
        f"unknown task {name}; "
        + (f"the nearest names are {', '.join(nearest)}; " if nearest else "")
        + f"known tasks: {', '.join(TASKS)}, every other image task of lmms-eval, and those in the "
        "folder suite.include_path"
    )


def _check(name: str, config: Mapping[str, Any]) -> None:
    """Check what the files of a task tell.

    Raises:
        ValueError: it cannot be run here.
    """
    kind = config.get("output_type", "generate_until")
    if "class" in config:
        raise ValueError(f"task {name} is a Python class; only tasks of YAML files can be run")
    if kind != "generate_until":
        raise ValueError(
            f"task {name} is of type {kind}; pruned models answer tasks of type generate_until only"
        )
    if not config.get("dataset_path"):
        raise ValueError(f"task {name} names no data set (dataset_path)")
    if (config.get("dataset_kwargs") or {}).get("video"):
        raise ValueError(f"task {name} shows videos, which are not supported")
    if not any(os.environ.get(key) for key in KEYS) and asks_judge(config):
        raise ValueError(
            f"task {name} is scored by a judge model over an API, and neither "
            f"{' nor '.join(KEYS)} is set: set one, or name another task"
        )
    options = config.get("generation_kwargs") or {}
    if options.get("num_beams", 1) != 1 or float(options.get("temperature") or 0) > 0:
        asked = {key: options[key] for key in ("temperature", "num_beams") if key in options}
        raise ValueError(f"task {name} asks for {asked}; pruned models generate greedily")


def _metrics(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [metric for metric in config.get("metric_list") or [] if metric and "metric" in metric]


def asks_judge(config: Mapping[str, Any]) -> bool:
    """Whether the functions that score a task may ask a model over an API."""
    functions = [config.get("process_results")]
    functions += [metric.get("aggregation") for metric in _metrics(config)]
    waiting = [
        (one.folder / f"{one.rpartition('.')[0].replace('.', '/')}.py", one.rpartition(".")[2])
        for one in functions
        if isinstance(one, _Function)
    ]
    seen = set(waiting)
    while waiting:
        path, function = waiting.pop()
        source, uses = _definition(path, function)
        if _JUDGE.search(source):
            return True
        waiting += [use for use in uses if use not in seen]
        seen.update(uses)
    return False


def _definition(path: Path, name: str) -> tuple[str, list[tuple[Path, str]]]:
    """The source of what a file calls `name`, and the other definitions that it uses."""
    sources, imported = _module(path)
    if name in imported:
        return "", [imported[name]]
    source = "\n".join(sources.get(name, []))
    words = set(re.findall(r"[A-Za-z_]\w*", source))
    return source, [(path, word) for word in sorted(words & {*sources, *imported})]


@cache
def _module(path: Path) -> tuple[dict[str, list[str]], dict[str, tuple[Path, str]]]:
    """Of a Python file: sources by top-level name, and the file and name of what it imports.

    Only what is imported from lmms-eval or from files beside it counts.
    """
    sources: dict[str, list[str]] = {}
    imported: dict[str, tuple[Path, str]] = {}
    if not path.is_file():
        return sources, imported
    text = path.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        source = ast.get_source_segment(text, node) or ""
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            sources.setdefault(node.name, []).append(source)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = alias.asname or alias.name
                if "judge" in node.module:  # lmms-eval's package of judges
                    sources.setdefault(name, []).append(source)
                elif file := _file_of(node.module, path):
                    imported[name] = (file, alias.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    sources.setdefault(target.id, []).append(source)
    return sources, imported


def _file_of(module: str, path: Path) -> Path | None:
    """The file of a module of lmms-eval, or of one beside `path`."""
    root, _, rest = module.partition(".")
    base = definition_folder().parent if root == "lmms_eval" else path.parent
    file = base / f"{(rest if root == 'lmms_eval' else module).replace('.', '/')}.py"
    return file if file.is_file() else None


class _Loader(yaml.SafeLoader):
    """Reads lmms-eval's YAML files without importing the functions that they name."""


def _construct(loader: _Loader, node: yaml.ScalarNode) -> _Function:
    function = _Function(loader.construct_scalar(node))
    function.folder = Path(loader.name).parent
    return function


_Loader.add_constructor("!function", _construct)


def _with_includes(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A YAML file after those that it includes, each with its own fields."""
    try:
        with path.open(encoding="utf-8") as file:
            config = yaml.load(file, _Loader)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no readable YAML file: {error}") from error
    included = config.pop("include", [])
    for other in reversed([included] if isinstance(included, str) else included):
        yield from _with_includes(Path(other) if Path(other).is_file() else path.parent / other)
    yield path, config


def _config(path: Path) -> dict[str, Any]:
    """The fields of a task's YAML file and of those that it includes."""
    fields: dict[str, Any] = {}
    for _, own in _with_includes(path):
        fields |= own
    return fields


def _digest(path: Path) -> str:
    """Digest of a task's YAML files and of the code beside them."""
    files = {file for file, _ in _with_includes(path)} | set(path.parent.glob("*.py"))
    contents = [(file.name, file.read_bytes()) for file in sorted(files)]
    return hashlib.sha256(repr(contents).encode()).hexdigest()[:12]
