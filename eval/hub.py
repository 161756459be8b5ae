"""What the Hugging Face hub says about a repository, and what to do where it says no."""

import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

Kind = Literal["model", "dataset"]
log = logging.getLogger(__name__)
_WITHOUT = (
    "set HF_HUB_OFFLINE=1, if the local cache has the model and the data; or name folders "
    "(docs/USAGE.md, Offline)"
)
_BUSY = (408, 429, 500, 502, 503, 504)
_WAITS = (1, 3, 9)  # seconds before another try
T = TypeVar("T")


class Resolved(NamedTuple):
    """The commit that a revision means.

    Attributes:
        commit: by the hub or, if it does not answer, by the local cache. None: neither knows.
        error: why the hub did not say, or why it would not give out the files.
    """

    commit: str | None
    error: Exception | None = None


_resolved: dict[tuple[str, str, Kind], Resolved] = {}


def resolve(repository: str, revision: str, kind: Kind = "model") -> Resolved:
    """The commit that a revision such as `main` means, asked for once per process.

    The answer is noted in the local cache, as a download of the branch would do, so that the same
    sweep works offline.
    """
    key = repository, revision, kind
    if key not in _resolved:
        _resolved[key] = _ask(*key)
    return _resolved[key]


def known() -> dict[tuple[str, str, Kind], Resolved]:
    """The commits that the hub gave, for other processes of a sweep, which must use the same."""
    return {key: answer for key, answer in _resolved.items() if answer.error is None}


def adopt(answers: dict[tuple[str, str, Kind], Resolved]) -> None:
    """Use the answers of another process instead of asking the hub."""
    _resolved.update(answers)


def forget() -> None:
    """Ask again from now on."""
    _resolved.clear()


def _ask(repository: str, revision: str, kind: Kind) -> Resolved:
    if re.fullmatch("[0-9a-f]{40}", revision):
        return Resolved(revision)
    from huggingface_hub import auth_check, constants, repo_info  # slow to import
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:  # such as a folder that does not exist
        return Resolved(None, error)
    folder = f"{kind}s--{repository.replace('/', '--')}"
    note = Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
    cached = note.read_text().strip() if note.is_file() else None
    if constants.HF_HUB_OFFLINE:
        return Resolved(cached, None if cached else _Offline())
    try:
        # a hub that answers late is as good as none: the cache may have the files
        found = patiently(
            lambda: repo_info(repository, repo_type=kind, revision=revision, timeout=10)
        )
        if found.gated:
            auth_check(repository, repo_type=kind)
    except Exception as error:  # of the network, of the hub, of a name that is no hub id
        log.debug("the hub does not say the commit of %s: %s", repository, error)
        return Resolved(cached, error)
    if found.sha and found.sha != cached:
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(found.sha)
        except OSError as error:  # a cache that others keep: it has the files, or loading fails
            log.debug("the commit of %s cannot be noted: %s", repository, error)
    return Resolved(found.sha)


def patiently(call: Callable[[], T]) -> T:
    """Call again, a few times, what fails because the hub is busy.

    Files that came whole stay in the cache. The libraries try most requests again by themselves,
    but not a file whose download begins with status 503.
    """
    for wait in _WAITS:
        try:
            return call()
        except Exception as error:
            found = hub_error(error)
            if not found or found.response.status_code not in _BUSY:
                raise
            log.warning("%s. Trying again in %d s.", first_line(found), wait)
        time.sleep(wait)
    return call()


class _Offline(OSError):
    """The hub must not be asked, and the cache does not know."""


def problem(repository: str, revision: str, kind: Kind, option: str) -> str | None:
    """Why a sweep cannot use a repository, with the cure, in one paragraph; None: it can.

    Args:
        option: the setting with a folder that could replace the repository.
    """
    error = resolve(repository, revision, kind).error
    if error is None:
        return None
    what = "model" if kind == "model" else "data set"
    return (
        f"the {what} {repository}, revision {revision}: {explain(error, repository, kind, option)}."
    )


def explain(error: BaseException, repository: str, kind: Kind, option: str) -> str:
    """Cause and cure of an error of the hub, with status and address if it answered."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError
    from huggingface_hub.errors import RepositoryNotFoundError as NotFound
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    found = hub_error(error)
    at = constants.ENDPOINT
    page = f"{at}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    answered = f" (HTTP {found.response.status_code} from {found.response.url})" if found else ""
    if isinstance(found, GatedRepoError):
        return (
            f"its owner gives access to some users only{answered}. Ask for it on {page}, then "
            "run `hf auth login`, or set HF_TOKEN"
        )
    if isinstance(found, NotFound):
        return (
            f"the hub has no such repository, or a private one{answered}. Correct the name in "
            f"{option}; for a private one run `hf auth login`, or set HF_TOKEN"
        )
    if isinstance(found, NoRevision):
        return f"the hub has no such revision{answered}. Correct the revision beside {option}"
    if found and found.response.status_code in (401, 403):
        return f"the hub refuses access{answered}. Run `hf auth login`, or set HF_TOKEN"
    if found:
        return f"the hub fails{answered}. Try again later; or {_WITHOUT}"
    if isinstance(error, _Offline):
        return (
            "HF_HUB_OFFLINE is set, and the local cache does not have it. Unset it and go online, "
            f"or set {option} to a folder"
        )
    if isinstance(error, HFValidationError):
        return f"this is neither a folder here nor a name on the hub. Correct {option}"
    if isinstance(error, json.JSONDecodeError):
        return (
            f"{at} answers with something that is no answer of a hub, such as the login page of a "
            f"network or a proxy. Open it in a browser, or correct HF_ENDPOINT; or {_WITHOUT}"
        )
    return f"the hub {at} does not answer ({first_line(error)}). Check the network; or {_WITHOUT}"


def hub_error(error: BaseException | None):  # type: ignore[no-untyped-def] # imported late
    """The hub's own error among the causes of an error; None if it did not answer with one."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
