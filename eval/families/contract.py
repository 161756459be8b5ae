"""What injection reads of transformers by name, looked up once in the called signatures."""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import transformers
from packaging.version import Version

Keywords = dict[str, Any]

# Releases of transformers that `make test-matrix` runs on. Their patch releases count as tested.
TESTED = ("5.0.0", "5.17.0", "5.23.0", "5.24.0")
# our name of an argument or of an output's field -> what releases of transformers call it
SPELLINGS = {"cache": ("cache", "past_key_values")}  # `cache` since 5.24


class ContractError(ValueError):
    """The model lacks something that injection reads by name."""

    def __init__(self, lacking: str) -> None:
        super().__init__(
            f"{lacking}, which injection reads. Pass the model itself, without a wrapper; if it "
            f"has none, transformers {transformers.__version__} names it otherwise: {cure()}"
        )


def is_tested(version: str) -> bool:
    """Whether a release has the minor version of a tested one; development versions never do."""
    release = Version(version)
    minors = {Version(listed).release[:2] for listed in TESTED}
    return release.release[:2] in minors and not release.is_prerelease


def tested() -> str:
    """The tested minor versions, as text."""
    return ", ".join(version.rpartition(".")[0] for version in TESTED)


def cure() -> str:
    """What to do about a release that does not fit."""
    newest = TESTED[-1].rpartition(".")[0]
    return f"install a tested release ({tested()}), with pip install 'transformers=={newest}.*'"


class Arguments:
    """The arguments of one function, whatever their spelling, by position or by keyword.

    Args:
        function: what is called; its signature is read here, through decorators that keep it.
        names: the arguments that injection reads, in our spelling.

    Raises:
        ContractError: the signature lacks one of the names.
    """

    def __init__(self, function: Callable[..., Any], *names: str) -> None:
        parameters = inspect.signature(function).parameters
        self._order = [
            name
            for name, parameter in parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        self._ours: dict[str, str] = {}
        self._theirs: dict[str, str] = {}
        for name in names:
            spellings = SPELLINGS.get(name, (name,))
            found = next((spelling for spelling in spellings if spelling in parameters), None)
            if found is None:
                who = getattr(function, "__qualname__", repr(function))
                raise ContractError(f"{who} has no argument {' or '.join(spellings)}")
            self._theirs[name] = found
            self._ours |= dict.fromkeys(spellings, name)

    def read(self, args: tuple[Any, ...], kwargs: Keywords) -> Keywords:
        """The arguments of a call as keywords, in our spelling.

        Raises:
            ValueError: more positions than the signature has, or an argument that comes twice.
        """
        pairs = [*zip(self._order, args, strict=False), *kwargs.items()]
        read = {self._ours.get(name, name): value for name, value in pairs}
        if len(read) < len(args) + len(kwargs):
            raise ValueError(
                f"a call with {len(args)} arguments by position and {', '.join(kwargs) or 'none'} "
                f"by keyword does not fit the signature ({', '.join(self._order)}), or "
                "gives an argument twice"
            )
        return read

    def write(self, keywords: Keywords) -> Keywords:
        """What `read` gave, in the spelling of the function."""
        return {self._theirs.get(name, name): value for name, value in keywords.items()}


def require(root: Any, *paths: str) -> None:
    """Check that `root` has the attributes `paths`, with dots between their parts.

    Raises:
        ContractError: one is missing.
    """
    for path in paths:
        try:
            operator.attrgetter(path)(root)
        except AttributeError as error:
            raise ContractError(f"{type(root).__name__} has no `{path}` ({error})") from error


def cache_of(output: Any) -> Any:
    """The cache in an output of the language model.

    Raises:
        ContractError: the output has none under a known name.
    """
    for name in SPELLINGS["cache"]:
        if name in output:
            return output[name]
    raise ContractError(f"{type(output).__name__} has no field {' or '.join(SPELLINGS['cache'])}")
