"""Finds a model's files and what identifies them.

Imports no model code, so that a sweep with nothing to do is fast.
"""

import hashlib
import logging
import re
from functools import cache
from pathlib import Path
from typing import Literal

from secateur.paths import PACKAGE, ROOT

Kind = Literal["model", "dataset"]
log = logging.getLogger(__name__)


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


@cache
def commit_on_hub(repository: str, revision: str, kind: Kind = "model") -> str | None:
    """The commit that a revision such as `main` means, resolved once per process.

    The hub is asked; if it does not answer, the local cache says which commit it last gave. None
    if neither knows.
    """
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    import huggingface_hub  # slow to import
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        try:
            # a hub that answers late is as good as none: the cache may have the files
            found = huggingface_hub.repo_info(
                repository, repo_type=kind, revision=revision, timeout=10
            )
            return found.sha
        except Exception as error:  # of the network, of the hub, of a name that is no hub id
            log.info("the hub does not say the commit of %s: %s", repository, error)
    folder = f"{kind}s--{repository.replace('/', '--')}"
    reference = Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
    return reference.read_text().strip() if reference.is_file() else None


def not_loaded(
    pretrained: str, revision: str, error: Exception, option: str = "model.pretrained"
) -> str:
    """The message for a model that could not be loaded: what was looked for, where, and the fix.

    `option` is the setting that the message tells the user to change.
    """
    place = locate(pretrained)
    cause = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if isinstance(place, Path):
        return (
            f"the model in {place} could not be loaded: a file is missing or damaged ({cause}). "
            "Restore the folder."
        )
    return (
        f"the model {pretrained!r} (revision {revision!r}) is no folder here, not in the local "
        f"Hugging Face cache, and could not be fetched from the hub ({cause}). "
        f"Go online, or download it elsewhere and set {option}=/its/folder."
    )
