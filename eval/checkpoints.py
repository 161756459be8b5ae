"""Finds a model's files and what identifies them.

Imports no model code, so that a sweep with nothing to do is fast.
"""

import hashlib
from functools import cache
from pathlib import Path

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
    """Identifies the weights: a digest of a local folder's files, otherwise hub id and revision."""
    place = locate(pretrained)
    if not isinstance(place, Path):
        return f"{pretrained}@{revision}"
    digest = hashlib.sha256()
    for file in sorted(place.iterdir()):
        if file.is_file() and file.suffix != ".md":
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def hub_commit(pretrained: str, revision: str) -> str | None:
    """The commit that a revision like `main` means in the local cache; None for a folder."""
    if isinstance(locate(pretrained), Path):
        return None
    from huggingface_hub import try_to_load_from_cache  # slow to import

    place = try_to_load_from_cache(pretrained, "config.json", revision=revision)
    return Path(place).parent.name if isinstance(place, str) else None


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
