"""Finished cells as runs of Weights & Biases.

They are written from the records when a sweep ends, so that logging can be repeated. The cells of
one setting (suite, model, limit, task seed) share a table: they are a group, and the group's tables
are one more run.
"""

import html
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import wandb
from omegaconf import DictConfig, OmegaConf

from secateur.progress import console, print_error
from secateur.records import Record, digest
from secateur.reporting import comparison, interval_table, kept, tables
from secateur.reporting.agreement import agreement, agreement_matrices
from secateur.reporting.comparison import Cell
from secateur.reporting.cost_figures import accuracy_against
from secateur.reporting.costs import first_token_flops
from secateur.reporting.overlay import kept_tokens
from secateur.reporting.score_figure import scores
from secateur.reporting.wandb_values import documents, image, numbers, settings, table
from secateur.store import Store


class _Run(NamedTuple):
    """A run that may have to be written.

    Attributes:
        name: for messages.
        id: wandb's id of the run.
        source: digest of the records that the run is made from.
        write: writes the run.
    """

    name: str
    id: str
    source: str
    write: Callable[[], None]


class WandbLog:
    """Logs the cells of one sweep.

    A run's id follows from the cell and the sweep, so that no cell is logged twice. The folder
    `<folder>/wandb/logged` remembers what was logged; delete it to log everything again. Online, a
    run with that id is resumed.

    Args:
        results: folder of the sweep.
        suite: settings of the sweep's suite, which say where the images are.
        experiment: name of the sweep's experiment, if it has one.
        project, entity, mode, folder, samples, overlays: see configs/logger/wandb.yaml.

    Raises:
        ValueError: a field has an impossible value, or mode=online without a login.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        results: Path,
        suite: dict[str, Any],
        experiment: str | None,
        project: str,
        entity: str | None,
        mode: str | None,
        folder: str,
        samples: int,
        overlays: int,
    ) -> None:
        if mode not in (None, "online", "offline"):
            raise ValueError(f"logger.mode={mode!r} is not one of online, offline, null")
        if samples < 0 or overlays < 0:
            raise ValueError(f"logger.samples={samples}, logger.overlays={overlays}: at least 0")
        login = bool(wandb.api.is_authenticated)
        if mode == "online" and not login:
            raise ValueError(
                "logger.mode=online needs a login: run `wandb login`, or set logger.mode=offline"
            )
        self.mode: Any = mode or ("online" if login else "offline")
        self.results, self.store, self.folder = results, Store(results), Path(folder)
        self.suite, self.experiment = suite, experiment
        self.project, self.entity = project, entity
        self.samples, self.overlays = samples, overlays
        self._logged = self.folder / "wandb" / "logged" / f"{self.mode}_{entity or 'own'}_{project}"
        self._logged.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of(cls, config: DictConfig) -> "WandbLog":
        """As the config of a sweep says, Hydra's own node included."""
        fields: Any = OmegaConf.to_container(config.logger, resolve=True)
        suite: Any = OmegaConf.to_container(config.suite, resolve=True)
        fields.pop("name")
        experiment = config.hydra.runtime.choices.get("experiment")
        return cls(Path(config.results), suite, experiment, **fields)

    def log(self, records: tables.Records) -> bool:
        """Write the runs that are missing and print what could not be written.

        If the service cannot be reached, or refuses, the rest is not tried: every run would wait
        for its time-out.

        Returns:
            Whether all runs are logged now.
        """
        runs = [run for group in tables.by_setting(records) for run in self._runs(group)]
        missing = [run for run in runs if not self._is_logged(run)]
        failed: list[tuple[str, str]] = []
        for number, run in enumerate(missing):
            try:
                run.write()
                (self._logged / run.id).write_text(run.source)
            except wandb.Error as error:
                failed += [
                    (left.name, f"{type(error).__name__}: {error}") for left in missing[number:]
                ]
                break
            except Exception as error:  # the record is safe, and so are the other runs
                failed.append((run.name, f"{type(error).__name__}: {error}"))
        where = (
            f"{self.folder / 'wandb'}; `wandb sync` uploads them"
            if self.mode == "offline"
            else f"project {self.project}"
        )
        new, old = len(missing) - len(failed), len(runs) - len(missing)
        console.print(
            f"wandb, {self.mode}: {new} runs logged, {old} were logged before ({where})",
            highlight=False,
        )
        for message in dict.fromkeys(text for _, text in failed):
            names = [name for name, text in failed if text == message]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            print_error(f"NOT LOGGED {shown}: {message}")
        if failed:
            print_error("The records are complete; the same command logs what is missing.")
        return not failed

    def _is_logged(self, run: _Run) -> bool:
        mark = self._logged / run.id
        return mark.exists() and mark.read_text() == run.source

    def _runs(self, group: tables.Records) -> list[_Run]:
        """The runs of a setting: its cells, and the tables."""
        identity = group[0].identity
        sweep = [self.experiment] if self.experiment else []
        name = "_".join([*sweep, identity.stem, identity.setting])
        runs = []
        for record in group:
            own = record.identity
            title = f"{own.task} {own.pruner.label} {own.budget}"
            key = digest([name, own.as_json()])[:16]
            runs.append(_Run(title, key, record.seal, partial(self._cell, key, name, record)))
        seals = digest(sorted(record.seal for record in group))
        key = digest([name, "tables"])[:16]
        return [
            *runs,
            _Run(f"tables of {name}", key, seals, partial(self._tables, key, name, group)),
        ]

    def _init(
        self,
        key: str,
        group: str,
        kind: str,
        name: str,
        tags: dict[str, Any],
        config: dict[str, Any],
        notes: str,
    ) -> Any:
        """Open a run.

        It holds no console, machine or checkout of the logging: the record says where a cell ran.
        """
        return wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            dir=self.folder,
            id=key,
            resume="allow" if self.mode == "online" else None,
            name=name,
            group=group,
            job_type=kind,
            # wandb allows 64 characters
            tags=[f"{tag}:{value}"[:64] for tag, value in tags.items() if value is not None],
            config=config,
            notes=notes,
            settings=settings(),
        )

    def _cell(self, key: str, group: str, record: Record) -> None:
        identity, cell = record.identity, self._load(record)
        tags = {
            "model": identity.model.name,
            "method": cell.name,
            "budget": cell.budget,
            "suite": identity.suite.name,
            "task": cell.task,
            "experiment": self.experiment,
        }
        notes: list[str] = []
        logged: dict[str, Any] = numbers(cell, notes)
        logged["samples"] = table(cell.rows.head(self.samples))
        if pictures := self._pictures(cell, notes):
            logged["overlays"] = pictures
        config = identity.as_json() | {
            "method": cell.method,
            "environment": record.environment.as_json(),
            "cell": identity.digest,
        }
        with self._init(
            key, group, "cell", f"{cell.task} {cell.key}", tags, config, "\n\n".join(notes)
        ) as run:
            run.log(logged)

    def _tables(self, key: str, name: str, group: tables.Records) -> None:
        """Log accuracy and the comparison with its figures; notes: the table with intervals."""
        identity, cells = group[0].identity, [self._load(record) for record in group]
        logged: dict[str, Any] = {"cells": len(cells), "accuracy": table(tables.accuracy(group))}
        caption = identity.title
        try:
            compared = comparison.compare(cells)
        except ValueError as error:
            notes = [f"No comparison: {error}."]
        else:
            notes = [html.escape(interval_table.markdown(cells, compared), quote=False)]
            logged |= {
                "comparison": table(compared),
                "tasks": image(scores(compared, caption)),
            }
            try:
                flops = first_token_flops(cells).mean
                figure = accuracy_against(compared, flops, "FLOPs until the first token", caption)
                logged["accuracy_flops"] = image(figure)
            except ValueError as error:
                notes.append(f"No accuracy against FLOPs: {error}.")
            if shares := agreement(cells):
                logged["agreement"] = image(agreement_matrices(shares, caption))
        commits = sorted({record.environment.commit for record in group})
        shared = ("suite", "model", "limit", "seed", "versions")
        own = identity.as_json()
        config = {name: own[name] for name in shared} | {"commits": commits}
        tags = {
            "model": identity.model.name,
            "suite": identity.suite.name,
            "experiment": self.experiment,
        }
        with self._init(
            key, name, "tables", f"tables of {name}", tags, config, "\n\n".join(notes)
        ) as run:
            run.log(logged)

    def _load(self, record: Record) -> Cell:
        """A cell with its rows, without the long lists of tokens, which no table needs."""
        rows = self.store.cell(record.identity).samples()
        return Cell(
            record,
            rows.drop(
                columns=["kept_indices", "layer_tokens", "crops", "sections"], errors="ignore"
            ),
        )

    def _pictures(self, cell: Cell, notes: list[str]) -> list[wandb.Image]:
        """The first images beside the tokens that the cell kept; notes say why there are none."""
        identity = cell.record.identity
        if not self.overlays or cell.name == "none":
            return []
        if identity.suite.model_dump() != {key: self.suite[key] for key in ("name", "revision")}:
            notes.append(f"No pictures of kept tokens: the sweep's suite is {self.suite['name']}.")
            return []
        docs = (
            cell.rows.sort_values("doc_id")
            .drop_duplicates("image_id")["doc_id"]
            .head(self.overlays)
        )
        pictures = []
        try:
            source = documents(identity.suite.name, cell.task, self.suite["data_root"])
            for _, row in kept.samples(cell, self.results, docs.tolist()).iterrows():
                seen = kept.views(identity.model, source.images(cell.task, row), row)
                own = kept.masks(identity.model, cell.name, seen, row)
                figure = kept_tokens([view for one in seen for view in one], {cell.key: own})
                pictures.append(image(figure, f"document {row['doc_id']}: {row['prompt']}"))
        except (OSError, ValueError) as error:  # data sets that are not here, or others
            notes.append(f"No pictures of kept tokens: {error}")
        return pictures
