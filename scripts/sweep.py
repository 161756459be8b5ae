"""Run cells: `python scripts/sweep.py pruner=scope budget=16`; `-m` combines comma lists.

`plugins=[mine.py]` adds methods, `scope.alpha=1,2` is for one method, `seeds=0,1,2` for those that
draw random numbers.
"""

import gc
import logging
import os
import sys

import hydra
from omegaconf import DictConfig

from secateur.grid import arguments
from secateur.progress import KEPT, print_error


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
        sys.argv[1:] = arguments(sys.argv[1:])
    except ValueError as error:
        print_error(str(error))
        sys.exit(1)
    try:
        main()
    except KeyboardInterrupt:
        print(f"\nInterrupted. {KEPT}", file=sys.stderr)
        sys.exit(130)
