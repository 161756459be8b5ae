"""Pruning methods. One method, one file; the imports below fill the registry."""

from secateur.pruners import (
    cdpruner,
    dart,
    divprune,
    fastervlm,
    fastv,
    fsr,
    hiprune,
    hired,
    holov,
    none,
    pact,
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
    tome,
    trim,
    trimtokenator,
    uniform,
    visionzip,
    vispruner,
    zspaprune,
)
from secateur.pruners.base import EXTRA, Pruner, PrunerError, Selection, VisualTokens
from secateur.pruners.in_llm import InLLMPruner, LayerTokens
from secateur.pruners.registry import REGISTRY, build

__all__ = [
    "EXTRA",
    "REGISTRY",
    "InLLMPruner",
    "LayerTokens",
    "Pruner",
    "PrunerError",
    "Selection",
    "VisualTokens",
    "build",
]
