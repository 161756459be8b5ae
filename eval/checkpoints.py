"""Finds a model's files and what identifies them.

Imports no model code, so that a sweep with nothing to do is fast.
"""

import hashlib
from functools import cache
from pathlib import Path

from secateur import hub
from secateur.hub import Kind
from secateur.paths import PACKAGE, ROOT


def locate(pretrained: str) -> str | Path:
    """The folder of that name, here or in the project; otherwise the name, as a hub id."""
    # in an installed package the folder eval/ is the package itself
    for folder in (Path(pretrained), ROOT / pretrained, PACKAGE / pretrained.removeprefix("eval/")):
        if folder.is_dir():
            return folder.resolve()
    return pretrained


@cache
def fingerprint(pretrained: str, revision: str) -> str:
    """Identifies the weights: a digest of a local folder's files, otherwise hub id and commit."""
    place = locate(pretrained)
    if not isinstance(place, Path):
        return f"{pretrained}@{pinned(pretrained, revision)}"
    digest = hashlib.sha256()
    for file in sorted(place.iterdir()):
        if file.is_file() and file.suffix != ".md":
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def pinned(pretrained: str, revision: str) -> str:
    """The commit of a model on the hub, for all of its loads; `revision` itself for a folder."""
    if isinstance(locate(pretrained), Path):
        return revision
    return commit_on_hub(pretrained, revision) or revision


def commit_on_hub(repository: str, revision: str, kind: Kind = "model") -> str | None:
    """The commit that a revision means, see `secateur.hub.resolve`; None if nobody knows it."""
    return hub.resolve(repository, revision, kind).commit


def not_loaded(
    pretrained: str, revision: str, error: Exception, option: str = "model.pretrained"
) -> str:
    """The message for a model that could not be loaded: the cause, and the fix.

    `option` is the setting that the message tells the user to change.
    """
    place = locate(pretrained)
    cause = hub.first_line(error)
    if isinstance(place, Path):
        return (
            f"the model in {place} could not be loaded: a file is missing or damaged ({cause}). "
            "Restore the folder."
        )
    if hub.hub_error(error):
        return (
            f"the model {pretrained}, revision {revision}: "
            f"{hub.explain(error, pretrained, 'model', option)}."
        )
    return (
        f"the model {pretrained!r} (revision {revision!r}) could not be loaded from the hub, nor "
        f"from its local cache ({cause}). Go online, or download it elsewhere and set "
        f"{option}=/its/folder."
    )
