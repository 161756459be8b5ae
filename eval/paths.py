"""Where the project's own files are: in a checkout, or in an installed package."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent  # the folder eval/ of a checkout
ROOT = PACKAGE.parent
_CHECKOUT = (ROOT / "pyproject.toml").is_file() and PACKAGE.name == "eval"
CONFIGS = ROOT / "configs" if _CHECKOUT else PACKAGE / "configs"
REPORTED = ROOT / "results" / "reported" if _CHECKOUT else PACKAGE / "reported"
SHAPES_MODEL = PACKAGE / "shapes" / "model"
