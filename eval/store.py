"""Results on disk: one folder per cell with record.json and samples.parquet, written at once."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    import pandas as pd

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the disk is full or read-only


class DamagedRecord(RuntimeError):
    """A stored cell is incomplete or was edited."""


def digest(value: Any) -> str:
    """Hash of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class _Lock(FileLock):
    """A separate class, because lmms-eval makes `FileLock` a singleton per path and process.

    A process could then take the same lock twice.
    """


class Store:
    """The cells in one results folder, which several processes may share.

    Next to an unfinished cell's folder are its answers so far (`.answers*.jsonl`) and, if it
    failed, the reason (`.failed.json`).

    Raises:
        PermissionError: the folder cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self.runs = root / "runs"
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.runs):
                pass
        except OSError as error:
            raise PermissionError(
                f"the results folder {root} cannot be written ({error}); set results=/another/folder"
            ) from error

    def folder(self, identity: dict[str, Any]) -> Path:
        """The folder of the cell with this identity, whether it exists or not."""
        budget = identity["budget"].replace("%", "pct").replace("/", "-per-")
        name = f"{identity['pruner']['name']}_{budget}_{digest(identity)[:12]}"
        return (
            self.runs
            / identity["suite"]["name"]
            / identity["model"]["name"]
            / identity["task"]
            / name
        )

    @contextmanager
    def claim(self, identity: dict[str, Any], part: str = "", wait: bool = False) -> Iterator[bool]:
        """Lock a cell (or a part of it) while it runs. Yields False if another process holds it.

        With `wait`, wait until the lock is free. The operating system holds the lock (flock) and
        releases it when the process ends, even by a crash. NFS and Lustre share it between nodes
        unless they are mounted with `nolock` or `localflock`; then two nodes may run the same
        cell, and the first record stays. A file system without flock gets a lock file. Only a
        process on the same node can tell that the owner of such a file is dead: delete
        `runs/.locks` when no sweep is running.
        """
        locks = self.runs / ".locks"
        locks.mkdir(exist_ok=True)
        lock = _Lock(locks / (digest(identity)[:12] + part))
        try:
            lock.acquire(blocking=wait)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def answers(self, identity: dict[str, Any], part: str = "") -> Path:
        """The file of answers of a running cell (or a part of it)."""
        folder = self.folder(identity)
        return folder.with_name(f"{folder.name}.answers{part}.jsonl")

    def all_answers(self, identity: dict[str, Any]) -> list[Path]:
        """The files of answers of all parts of an unfinished cell."""
        folder = self.folder(identity)
        return sorted(folder.parent.glob(f"{folder.name}.answers*.jsonl"))

    def forget_answers(self, identity: dict[str, Any]) -> None:
        for path in self.all_answers(identity):
            path.unlink(missing_ok=True)

    def has(self, identity: dict[str, Any]) -> bool:
        return (self.folder(identity) / "record.json").exists()

    def failure(self, identity: dict[str, Any], since: float = 0) -> str | None:
        """The traceback of a cell that failed at or after `since` (seconds since the epoch).

        None if it did not.

        Raises:
            DamagedRecord: the file is truncated or edited.
        """
        path = self._failure_path(identity)
        try:
            return (
                json.loads(path.read_text())["traceback"] if path.stat().st_mtime >= since else None
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedRecord(
                f"{path} is damaged ({error}); delete it to run the cell again"
            ) from error

    def load(self, identity: dict[str, Any]) -> dict[str, Any]:
        return self.read(self.folder(identity))

    @staticmethod
    def read(folder: Path) -> dict[str, Any]:
        """The record in a cell's folder, verified by its digests.

        Raises:
            DamagedRecord: a file is missing, truncated or edited.
        """
        try:
            record = json.loads((folder / "record.json").read_text())
            sealed = {key: value for key, value in record.items() if key != "seal"}
            samples = (folder / "samples.parquet").read_bytes()
            intact = (
                record["seal"] == digest(sealed)
                and record["samples_sha256"] == hashlib.sha256(samples).hexdigest()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedRecord(
                f"the record in {folder} is damaged ({error}); "
                "delete the folder to run the cell again"
            ) from error
        if not intact:
            raise DamagedRecord(
                f"the record in {folder} was changed after it was written; "
                "delete the folder to run the cell again"
            )
        return record

    @staticmethod
    def samples(folder: Path) -> "pd.DataFrame":
        """The samples of a cell, one row per document."""
        import pandas as pd

        return pd.read_parquet(folder / "samples.parquet")

    def records(self, damaged: list[str] | None = None) -> list[dict[str, Any]]:
        """The records of all finished cells, sorted by folder.

        Args:
            damaged: receives a message for each damaged cell.

        Raises:
            DamagedRecord: a cell is damaged, and `damaged` is None.
        """
        records = []
        for path in sorted(self.runs.glob("*/*/*/*/record.json")):
            try:
                records.append(self.read(path.parent))
            except DamagedRecord as error:
                if damaged is None:
                    raise
                damaged.append(str(error))
        return records

    def write(
        self, identity: dict[str, Any], record: dict[str, Any], samples: "pd.DataFrame"
    ) -> Path:
        """Store a finished cell, and delete its earlier failure and its files of answers."""
        folder, name = self.folder(identity), digest(identity)[:12]
        writing = self.runs / ".writing"
        for place in (folder.parent, writing):
            place.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=name, dir=writing))
        try:
            samples.to_parquet(scratch / "samples.parquet", index=False)
            content = record | {
                "identity": identity,
                "samples_sha256": hashlib.sha256(
                    (scratch / "samples.parquet").read_bytes()
                ).hexdigest(),
            }
            (scratch / "record.json").write_text(
                json.dumps(content | {"seal": digest(content)}, indent=1) + "\n"
            )
            for path in (scratch / "samples.parquet", scratch / "record.json", scratch):
                _flush(path)
            if not self.has(identity):
                shutil.rmtree(folder, ignore_errors=True)
                scratch.rename(folder)
                _flush(folder.parent)
        except OSError:
            if not self.has(
                identity
            ):  # else another process stored it and removed our scratch folder
                raise
        finally:
            for left in writing.glob(f"{name}*"):  # also those of a killed process
                shutil.rmtree(left, ignore_errors=True)
        self._failure_path(identity).unlink(missing_ok=True)
        self.forget_answers(identity)
        return folder

    def write_failure(
        self,
        identity: dict[str, Any],
        traceback: str,
        environment: dict[str, Any],
        config: dict[str, Any],
    ) -> Path:
        """Store why a cell failed, and with which settings, next to its folder."""
        path = self._failure_path(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".writing")
        content = {
            "identity": identity,
            "traceback": traceback,
            "environment": environment,
            "config": config,
        }
        scratch.write_text(json.dumps(content, indent=1) + "\n")
        _flush(scratch)
        scratch.rename(path)
        return path

    def _failure_path(self, identity: dict[str, Any]) -> Path:
        folder = self.folder(identity)
        return folder.with_name(folder.name + ".failed.json")


def _flush(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
