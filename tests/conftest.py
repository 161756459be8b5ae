"""Fixtures: tiny real transformers models.

Their weights are drawn wide, so that dropping tokens moves the logits.
"""

import importlib.util
import os
import tempfile
from pathlib import Path

_CACHE = tempfile.TemporaryDirectory(prefix="secateur-tests-")
# before the libraries read them; one thread a worker, as the golden vectors were made
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": _CACHE.name, "OMP_NUM_THREADS": "1"}

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from secateur.geometry import random_model, random_processor, tiny

settings.register_profile(
    "quick",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "thorough", settings.get_profile("quick"), max_examples=80
)  # `make test-thorough`
settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """lmms-eval's own model classes import decord, which neither it nor this project installs."""
    if importlib.util.find_spec("decord"):
        return
    skipped = pytest.mark.skip(reason="lmms-eval's own model classes need it: pip install decord")
    for item in items:
        if item.get_closest_marker("lmms_classes"):
            item.add_marker(skipped)


def tiny_model(family: str, attention: str) -> PreTrainedModel:
    return random_model(tiny(family), attn_implementation=attention, std=0.2)


@pytest.fixture(scope="session", params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def processor() -> ProcessorMixin:
    return random_processor(tiny("llava"))


@pytest.fixture(scope="session")
def model(attention: str) -> PreTrainedModel:
    return tiny_model("llava", attention)


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def qwen(request: pytest.FixtureRequest) -> str:
    """A family with M-RoPE."""
    return request.param


@pytest.fixture(scope="session")
def qwen_processor(qwen: str) -> ProcessorMixin:
    return random_processor(tiny(qwen))


@pytest.fixture(scope="session")
def qwen_model(qwen: str, attention: str) -> PreTrainedModel:
    return tiny_model(qwen, attention)


@pytest.fixture(scope="session")
def qwen_eager(qwen: str) -> PreTrainedModel:
    return tiny_model(qwen, "eager")


@pytest.fixture(scope="session")
def shapes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded data set, made once for all processes of this test run.

    Read only: copy it to change it.
    """
    from secateur.shapes.datasets import build  # needs `datasets`, which most tests do without

    own = tmp_path_factory.getbasetemp()
    return build(
        (own.parent if hasattr(request.config, "workerinput") else own) / "data" / "shapes"
    )


@pytest.fixture(scope="module")
def sweeps(shapes: Path):
    """Sweeps over two small tasks."""
    from sweeping import Sweeps

    return Sweeps(shapes)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    )
