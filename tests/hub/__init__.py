"""A hub on the loopback interface, with tiny repositories under the true names."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hub import checkpoints, data
from hub.server import Fault, Hub

__all__ = ["DATA", "MODELS", "Fault", "Hub", "commit", "put_data", "put_model", "run"]

ROOT = Path(__file__).resolve().parents[2]
CLIP = "openai/clip-vit-large-patch14-336"
# config in configs/model -> repository
MODELS = {
    "llava_1_5_7b": "llava-hf/llava-1.5-7b-hf",
    "llava_1_5_13b": "llava-hf/llava-1.5-13b-hf",
    "llava_next_7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava_next_13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "qwen2_5_vl_7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen2_5_vl_3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2_vl_7b": "Qwen/Qwen2-VL-7B-Instruct",
}
DATA: dict[str, tuple[str, Callable[[], data.Tables]]] = {
    "pope": ("lmms-lab-encoder/POPE", data.pope),
    "scienceqa_img": ("lmms-lab-encoder/ScienceQA", data.scienceqa),
    "gqa": ("lmms-lab-encoder/GQA", data.gqa),
    "mme": ("lmms-lab-encoder/MME", data.mme),
    "mmmu_val": ("lmms-lab-encoder/MMMU", data.mmmu),
    "mmstar": ("Lin-Chen/MMStar", data.mmstar),
}


def commit(repository: str, number: int = 0) -> str:
    """The name of a repository's commit."""
    return hashlib.sha1(f"{repository} {number}".encode()).hexdigest()


def put_model(root: Path, config: str, number: int = 0) -> None:
    """Write a commit of a checkpoint into a hub's folder; each number has other weights."""
    repository = MODELS.get(config, CLIP)
    folder = root / "models" / repository / commit(repository, number)
    if repository == CLIP:
        checkpoints.clip(folder, number)
    else:
        make = checkpoints.qwen if config.startswith("qwen") else checkpoints.llava
        make(folder, config, number)


def put_data(root: Path, task: str, tables: data.Tables | None = None, number: int = 0) -> None:
    """Write a commit of a data set."""
    repository, make = DATA[task]
    folder = root / "datasets" / repository / commit(repository, number)
    data.write(folder, tables or make())


def run(hub: Hub, home: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """A command of the project in a process of its own, as a user of this hub runs it.

    Args:
        home: folder of the user's caches.
        arguments: of python.

    Returns:
        The exit status, and what was printed.
    """
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING_FACE", "PYTEST"))
    }
    own |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "COLUMNS": "400", **environment}
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=own, capture_output=True, text=True
    )
    return ended.returncode, " ".join((ended.stdout + ended.stderr).split())
