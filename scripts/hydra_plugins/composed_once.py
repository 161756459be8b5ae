"""Hydra's own sweeper, but it composes the config of each job once instead of twice."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import DictConfig


class _Composed:
    """A config loader that returns configs composed before, each of them once."""

    def __init__(self, loader: Any, configs: dict[tuple[str, ...], DictConfig]) -> None:
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
        assert self.config is not None
        loader = self.hydra_context.config_loader
        configs = {tuple(job): loader.load_sweep_config(self.config, list(job)) for job in batch}
        if isinstance(self.launcher, BasicLauncher):
            handing_over: Any = _Composed(loader, configs)
            self.launcher.hydra_context = dataclasses.replace(
                self.hydra_context, config_loader=handing_over
            )
