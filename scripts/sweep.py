"""Run cells: `python scripts/sweep.py pruner=scope budget=16`; `-m` combines comma lists."""

import gc
import logging
import os
import sys

import hydra
from omegaconf import DictConfig

from secateur.progress import KEPT


@hydra.main(config_path="../configs", config_name="sweep", version_base="1.3")
def main(config: DictConfig) -> None:
    from secateur.sweep import run_job

    run_job(config)


if __name__ == "__main__":
    # Start-up allocates much and frees little: garbage collection there costs a second. The first
    # cell that runs switches it on again.
    gc.disable()
    # one progress bar, ours, instead of one per library; their warnings stay
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("numexpr").setLevel(logging.WARNING)
    try:
        main()
    except KeyboardInterrupt:
        print(f"\nInterrupted. {KEPT}", file=sys.stderr)
        sys.exit(130)
