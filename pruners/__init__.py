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
from secateur.pruners.base import EXTRA, ImageShape, Pruner, PrunerError, Selection, VisualTokens
from secateur.pruners.in_llm import InLLMPruner, LayerTokens, PromptShape
from secateur.pruners.registry import REGISTRY, build, register
from secateur.pruners.scoring import ScoreTopK

__all__ = [
    "EXTRA",
    "REGISTRY",
    "ImageShape",
    "InLLMPruner",
    "LayerTokens",
    "PromptShape",
    "Pruner",
    "PrunerError",
    "ScoreTopK",
    "Selection",
    "VisualTokens",
    "build",
    "register",
]
