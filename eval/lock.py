"""The lock file: exact package versions, and how an environment differs from them."""

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from secateur.paths import ROOT

LOCK = ROOT / "requirements.lock"
_DECIDING = ("lmms-eval", "transformers")  # their code decides answers, so it is hashed as well


@dataclass(frozen=True)
class Pin:
    """One package of the lock, with its version and its marker."""

    line: int
    requirement: Requirement

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        (specifier,) = self.requirement.specifier
        return specifier.version

    @property
    def applies(self) -> bool:
        """Whether the pin is for this Python and platform."""
        return self.requirement.marker is None or self.requirement.marker.evaluate()


def pins(lock: Path = LOCK) -> Iterator[Pin]:
    """The pins of a lock file, in the order of their lines; hashes and comments are left out."""
    for number, line in enumerate(lock.read_text().splitlines(), 1):
        if line and not line.startswith((" ", "#")):
            yield Pin(number, Requirement(line.removesuffix("\\").strip()))


def digest(lock: Path = LOCK) -> str:
    """The name of a lock in records: the first 12 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(lock.read_bytes()).hexdigest()[:12]


def differences(lock: Path = LOCK) -> dict[str, str]:
    """Installed packages whose version is not the lock's.

    A package that is not installed does not count: an environment may need fewer packages.

    Returns:
        Package name -> "installed version (lock: version)".
    """
    found = {}
    for pin in pins(lock):
        installed = _installed(pin.name)
        if pin.applies and installed is not None and installed.version != pin.version:
            found[pin.name] = f"{installed.version} (lock: {pin.version})"
    return found


@cache
def state(lock: Path = LOCK) -> dict[str, Any]:
    """The lock's part of a record: its digest, or "not the lock" and the differences."""
    if not lock.exists():
        return {"lock": "not the lock", "differences": "installed without requirements.lock"}
    if differing := differences(lock):
        return {"lock": "not the lock", "differences": differing}
    return {"lock": digest(lock)}


def problems(lock: Path = LOCK) -> list[str]:
    """How this environment differs from the lock, with missing packages and edited files."""
    found = [f"{name} {versions}" for name, versions in differences(lock).items()]
    for pin in pins(lock):
        if not pin.applies:
            continue
        installed = _installed(pin.name)
        if installed is None:
            found.append(f"{pin.name} is not installed (lock: {pin.version})")
        elif pin.name in _DECIDING:
            found += [f"{pin.name}: {path} was edited or deleted" for path in _edited(installed)]
    return found


def unmet(pyproject: dict[str, Any], lock: Path = LOCK) -> list[str]:
    """Requirements of a parsed pyproject.toml that the lock does not meet, with its lines."""
    project = pyproject["project"]
    extras = project["optional-dependencies"].values()
    wanted = [Requirement(text) for part in (project["dependencies"], *extras) for text in part]
    by_name: dict[str, list[Pin]] = {}
    for pin in pins(lock):
        by_name.setdefault(pin.name, []).append(pin)
    found = []
    for requirement in wanted:
        mine = by_name.get(canonicalize_name(requirement.name), [])
        if not mine:
            found.append(f"{lock.name} has no line for {str(requirement)!r} of pyproject.toml")
        for pin in mine:
            if not requirement.specifier.contains(pin.version, prereleases=True):
                found.append(
                    f"{lock.name}, line {pin.line}: {pin.name}=={pin.version} does not meet "
                    f"{str(requirement)!r} of pyproject.toml"
                )
    return found


@cache
def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _edited(package: Distribution) -> Iterator[str]:
    """Python files of a package that differ from those in its wheel.

    A file that is no newer than the installation and has the size of the wheel's is not hashed:
    hashing all 6,000 files would delay every `make` command.
    """
    files = package.files or []
    installed = max(
        (Path(str(file.locate())).stat().st_mtime_ns for file in files if file.name == "RECORD"),
        default=0,
    )
    for file in files:
        if file.suffix != ".py" or file.hash is None:
            continue
        path = Path(str(file.locate()))
        try:
            stat = path.stat()
        except FileNotFoundError:
            yield str(file)
            continue
        untouched = stat.st_mtime_ns <= installed and stat.st_size == file.size
        if not untouched and _hash(path, file.hash.mode) != file.hash.value:
            yield str(file)


def _hash(path: Path, algorithm: str) -> str:
    """The hash of a file as the RECORD of a wheel writes it."""
    value = hashlib.new(algorithm, path.read_bytes()).digest()
    return base64.urlsafe_b64encode(value).decode().rstrip("=")
