"""Registers `--model secateur` with lmms-eval (entry point `lmms_eval.models`)."""

from typing import Any


def manifests() -> list[Any]:
    """What lmms-eval calls at start-up, so it imports nothing heavy."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest("secateur", chat_class_path="secateur.lmms_model.Secateur")]
