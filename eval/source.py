"""Which code runs: its commit, and a digest of the files that decide answers."""

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

from secateur.paths import PACKAGE, ROOT
from secateur.progress import KEPT

# What decides answers besides the methods, whose own digest stands beside their fields.
_DECIDING = (
    *("budget", "cache", "cell", "documents", "families", "geometry", "injection", "inputs"),
    *("loading", "models", "prefixes", "prompts", "shapes", "tasks"),
)


def _files() -> dict[str, str]:
    """The deciding files, relative to the package, with their digests."""
    paths = [
        path
        for name in _DECIDING
        for path in (
            (PACKAGE / name).glob("*.py") if (PACKAGE / name).is_dir() else [PACKAGE / f"{name}.py"]
        )
    ]
    return {
        str(path.relative_to(PACKAGE)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(paths)
    }


_AT_START = _files()  # of this process, before it imports most of them


# model type of a family from a plug-in -> digest of its file
_OUTSIDE: dict[str, str] = {}


def add_family(model_type: str, digest: str) -> None:
    """Make the code of a family from outside count for the models of this type."""
    _OUTSIDE[model_type] = digest


def code(family: str = "") -> str:
    """Digest of the code that decides answers, as it was when this process started.

    Args:
        family: model type; the file of a family from a plug-in counts too.
    """
    text = repr(_AT_START) + _OUTSIDE.get(family, "")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_unchanged() -> None:
    """Check the files again, after they were imported.

    Raises:
        ValueError: one was edited since the process started, so that nobody knows which state of it
            was imported.
    """
    now = _files()
    if edited := sorted(name for name in now | _AT_START if now.get(name) != _AT_START.get(name)):
        raise ValueError(
            f"{', '.join(edited)} changed after this sweep had started, so its answers would be of "
            f"neither version. Start the sweep again. {KEPT}"
        )


@cache
def commit() -> str:
    """The commit of this process's code, read once, when first asked for.

    Returns:
        `<commit>`; `<commit>-dirty` with changes that no commit holds; or `unknown: <reason>`.
    """
    return commit_of(ROOT)


def commit_of(root: Path) -> str:
    """The same of the project in the folder `root`. A missing or unwilling git is no error."""
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if top.returncode:
            return f"unknown: {_reason(top.stderr)}"
        # installed inside a repository of the user's, whose commit says nothing about this code
        if Path(top.stdout.removesuffix("\n")).resolve() != root.resolve():
            return "unknown: not a checkout"
        found = _git(root, "describe", "--always", "--dirty", "--exclude=*")
    except FileNotFoundError:
        return "unknown: git is not installed"
    except OSError as error:
        return f"unknown: git cannot be run ({error.strerror})"
    if found.returncode:
        return f"unknown: {_reason(found.stderr)}"
    return found.stdout.strip()


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    elsewhere = (
        "GIT_DIR",
        "GIT_WORK_TREE",
        "GIT_INDEX_FILE",
    )  # set in a hook of another repository
    env = {name: value for name, value in os.environ.items() if name not in elsewhere}
    env |= {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}  # English messages; other processes read too
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")


def _reason(errors: str) -> str:
    """What git's message means, without the paths of this machine where it is a known one."""
    if "not a git repository" in errors:
        return "not a checkout"
    if "dubious ownership" in errors:
        return "git refuses a folder of another owner, see safe.directory"
    lines = errors.strip().splitlines()
    return lines[0].removeprefix("fatal: ") if lines else "git failed and said nothing"
