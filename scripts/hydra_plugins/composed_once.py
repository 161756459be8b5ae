"""Hydra's own sweeper with axes that only some methods have; it composes each job once."""

import dataclasses
import multiprocessing
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from secateur import grid
from secateur.progress import console, print_error
from secateur.sweep import current

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
    """Composes and checks every job before the first one runs.

    Hydra's launcher in this process then runs these configs; other launchers compose again. The
    sweep ends here if a job cannot run; see `secateur.grid` for its jobs.
    """

    def split_arguments(  # type: ignore[override] # there a static method
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        assert self.hydra_context is not None
        assert self.config is not None
        loader: Any = self.hydra_context.config_loader
        names = loader.get_group_options("pruner", ObjectType.CONFIG)

        def fields(name: str) -> list[str]:
            if name not in names:  # Hydra's message lists the known ones
                return []
            return [str(key) for key in loader.repository.load_config(f"pruner/{name}").config]

        usual = str(self.config.hydra.runtime.choices.get("pruner"))
        methods = grid.Methods(frozenset(set(names) - set(self.config)), fields, usual)
        try:
            jobs, notes = grid.jobs(overrides, methods)
        except ValueError as error:
            _stop([str(error)])
        current().bar.jobs = len(jobs)
        for note in notes:
            console.print(note, highlight=False)
        return list(self.split_overrides_to_chunks(jobs, max_batch_size))

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        assert self.hydra_context is not None
        loader, master = self.hydra_context.config_loader, self.config

        def compose() -> Configs:
            assert master is not None
            return {tuple(job): loader.load_sweep_config(master, list(job)) for job in batch}

        launcher = self.launcher
        here = isinstance(launcher, BasicLauncher)
        configs = _while_importing(compose) if here else compose()
        from secateur.precheck import captures, problems  # imports the methods, and these PyTorch

        if found := problems(configs.values()):
            _stop(found)
        if not isinstance(launcher, BasicLauncher):
            return
        current().pool.captures = captures(configs.values())
        handing_over: Any = _Composed(loader, configs)
        launcher.hydra_context = dataclasses.replace(self.hydra_context, config_loader=handing_over)


def _stop(messages: list[str]) -> NoReturn:
    for message in messages:
        print_error(f"REFUSED {message}")
    print_error("Nothing was run.")
    sys.exit(1)


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
