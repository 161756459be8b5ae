"""Pruning methods. One method, one file; the imports below fill the registry."""

from secateur.pruners import (
    cdpruner,
    dart,
    divprune,
    fastervlm,
    fastv,
    fsr,
    hiprune,
    none,
    pooling,
    promprune,
    prumerge,
    prunesid,
    prunesid_dyn,
    pyramiddrop,
    random,
    scope,
    sparsevlm,
    sppruner,
    trimtokenator,
    uniform,
    visionzip,
    vispruner,
    zspaprune,
)
from secateur.pruners.base import (
    REGISTRY,
    InLLMPruner,
    LayerTokens,
    Pruner,
    PrunerError,
    Selection,
    VisualTokens,
    build,
)

__all__ = [
    "REGISTRY",
    "InLLMPruner",
    "LayerTokens",
    "Pruner",
    "PrunerError",
    "Selection",
    "VisualTokens",
    "build",
]
