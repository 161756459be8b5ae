"""What lmms-eval finds through the entry point `lmms_eval.models`: `--model secateur`. Imports nothing heavy."""

from typing import Any


def manifests() -> list[Any]:
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest("secateur", chat_class_path="secateur.lmms_model.Secateur")]
