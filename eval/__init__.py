"""Secateur: visual-token pruners in Hugging Face vision-language models, measured by lmms-eval.

The library is two names: `inject` puts a pruner into a model for a `with` block, and `build` makes
a pruner. Importing the package imports neither, since PyTorch takes seconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.injection import inject
    from secateur.pruners import build

__all__ = ["build", "inject"]


def __getattr__(name: str) -> Any:
    if name == "inject":
        from secateur.injection import inject

        return inject
    if name == "build":
        from secateur.pruners import build

        return build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
