"""Hydra's own sweeper, but it composes the config of each job once instead of twice."""

import dataclasses
import multiprocessing
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import DictConfig

_PATIENCE = 60  # seconds to wait for the fork after the import
Configs = dict[tuple[str, ...], DictConfig]  # by the overrides of the job


class _Composed:
    """A config loader that returns configs composed before, each of them once."""

    def __init__(self, loader: Any, configs: Configs) -> None:
        self._loader, self._configs = loader, configs

    def load_sweep_config(
        self, master_config: DictConfig, sweep_overrides: list[str]
    ) -> DictConfig:
        known = self._configs.pop(tuple(sweep_overrides), None)
        return known or self._loader.load_sweep_config(master_config, sweep_overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class ComposedOnce(BasicSweeper):
    """Composes every job before the first one runs, as Hydra does to find mistakes early.

    Hydra's launcher in this process then runs these configs; other launchers compose again.
    """

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        assert self.hydra_context is not None
        loader, master = self.hydra_context.config_loader, self.config

        def compose() -> Configs:
            assert master is not None
            return {tuple(job): loader.load_sweep_config(master, list(job)) for job in batch}

        if not isinstance(self.launcher, BasicLauncher):
            compose()
            return
        handing_over: Any = _Composed(loader, _while_importing(compose))
        self.launcher.hydra_context = dataclasses.replace(
            self.hydra_context, config_loader=handing_over
        )


def _while_importing(compose: Callable[[], Configs]) -> Configs:
    """Compose in a fork while this process imports PyTorch: each takes more than a second.

    A fork of a process that holds PyTorch or has threads, or of one on macOS, may hang. There, and
    where the fork fails to compose or is late, this process composes, so that errors are its own.
    """
    if sys.platform != "linux" or "torch" in sys.modules or threading.active_count() > 1:
        return compose()
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sending, compose), daemon=True)
    process.start()
    sending.close()
    import secateur.job
    import secateur.reporting.tables  # noqa: F401 - both import the methods, and these PyTorch

    try:
        return receiving.recv() if receiving.poll(_PATIENCE) else compose()
    except EOFError:
        return compose()
    finally:
        process.kill()
        process.join()


def _send(sending: Connection, compose: Callable[[], Configs]) -> None:
    try:
        configs = compose()
    except Exception:  # the other process composes again and fails in the same way
        return
    sending.send(configs)
