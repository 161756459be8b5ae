"""Run cells: `python scripts/sweep.py pruner=scope budget=16`, with `-m` for every combination of comma lists."""

import gc
import logging
import os
import sys

import hydra
from omegaconf import DictConfig

from secateur.progress import KEPT, Interrupt


@hydra.main(config_path="../configs", config_name="sweep", version_base="1.3")
def main(config: DictConfig) -> None:
    from secateur.sweep import run_job

    Interrupt.catch()
    run_job(config)


if __name__ == "__main__":
    # start-up allocates much and frees little: looking for cycles there costs a second; the first
    # cell that runs switches it on again
    gc.disable()
    # one progress bar, ours, in place of one a library; their warnings stay
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("numexpr").setLevel(logging.WARNING)
    try:
        main()
    except KeyboardInterrupt:
        print(f"\nInterrupted. {KEPT}", file=sys.stderr)
        sys.exit(130)
