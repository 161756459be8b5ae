"""Results on disk: one folder per cell with record.json and samples.parquet, written at once."""

import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from secateur.records import VERSION, Environment, Failure, Identity, Record, Results, digest

if TYPE_CHECKING:
    import pandas as pd

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the disk is full or read-only


class DamagedRecord(RuntimeError):
    """A stored cell is incomplete, was edited, or was written by another release."""


class _Lock(FileLock):
    """A separate class, because lmms-eval makes `FileLock` a singleton per path and process.

    A process could then take the same lock twice.
    """


def read(folder: Path) -> Record:
    """The record in a cell's folder, verified by its digests.

    Raises:
        DamagedRecord: a file is missing, truncated or edited; the record is another cell's; or it
            has another version or other fields than this release reads.
    """
    remedy = "delete the folder to run the cell again"
    try:
        content = json.loads((folder / "record.json").read_text())
        if (version := content.get("version", VERSION)) != VERSION:
            raise DamagedRecord(
                f"the record in {folder} has version {version!r}, and this release reads version "
                f"{VERSION}: use the release that wrote it, or {remedy}"
            )
        sealed = {key: value for key, value in content.items() if key != "seal"}
        samples = (folder / "samples.parquet").read_bytes()
        intact = (
            content["seal"] == digest(sealed)
            and content["samples_sha256"] == hashlib.sha256(samples).hexdigest()
        )
        record = Record.model_validate(content) if intact else None
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()
        )
        raise DamagedRecord(
            f"the record in {folder} is not what this release reads ({wrong}); {remedy}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedRecord(f"the record in {folder} is damaged ({error}); {remedy}") from error
    if record is None:
        raise DamagedRecord(f"the record in {folder} was changed after it was written; {remedy}")
    if folder.parts[-4:] != record.identity.folder.parts:
        raise DamagedRecord(
            f"the record in {folder} is that of another cell, {record.identity.folder}; {remedy}"
        )
    return record


class StoredCell:
    """The files of one cell, whether it has run or not.

    Attributes:
        identity: what decides its answers.
        folder: of its record and samples. Next to it are the answers of an unfinished cell
            (`.answers*.jsonl`) and, if it failed, the reason (`.failed.json`).
    """

    def __init__(self, runs: Path, identity: Identity) -> None:
        self.identity = identity
        self.folder = runs / identity.folder
        self._runs = runs
        self._failure = self.folder.with_name(self.folder.name + ".failed.json")

    def exists(self) -> bool:
        return (self.folder / "record.json").exists()

    def read(self) -> Record:
        """The cell's record.

        Raises:
            DamagedRecord: as `read`.
        """
        return read(self.folder)

    def samples(self) -> "pd.DataFrame":
        """One row per document, as `secateur.cell` makes them."""
        import pandas as pd

        return pd.read_parquet(self.folder / "samples.parquet")

    @contextmanager
    def claim(self, part: str = "", wait: bool = False) -> Iterator[bool]:
        """Lock the cell (or a part of it) while it runs. Yields False if another process holds it.

        With `wait`, wait until the lock is free. The operating system holds the lock (flock) and
        releases it when the process ends, even by a crash. NFS and Lustre share it between nodes
        unless they are mounted with `nolock` or `localflock`; then two nodes may run the same
        cell, and the first record stays. A file system without flock gets a lock file. Only a
        process on the same node can tell that the owner of such a file is dead: delete
        `runs/.locks` when no sweep is running.
        """
        locks = self._runs / ".locks"
        locks.mkdir(exist_ok=True)
        lock = _Lock(locks / (self.identity.digest[:12] + part))
        try:
            lock.acquire(blocking=wait)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise OSError(
                error.errno,
                f"the file system of {locks} gives no locks ({error.strerror}); mount it with "
                "locks, or set results=/a/folder/elsewhere",
            ) from error
        holder = self._holder(part)
        try:
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            holder.write_text(f"process {os.getpid()} on {platform.node()}, since {when}")
            yield True
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def holder(self, part: str = "") -> str:
        """Who holds the cell (or a part of it), for messages."""
        try:
            return self._holder(part).read_text()
        except FileNotFoundError:
            return "another process"

    def _holder(self, part: str) -> Path:
        return self._runs / ".locks" / f"{self.identity.digest[:12]}{part}.holder"

    def answers_file(self, part: str = "") -> Path:
        """The file of answers of the running cell (or a part of it)."""
        return self.folder.with_name(f"{self.folder.name}.answers{part}.jsonl")

    def answers_files(self) -> list[Path]:
        """The files of answers of all parts of the unfinished cell."""
        return sorted(self.folder.parent.glob(f"{self.folder.name}.answers*.jsonl"))

    def forget_answers(self) -> None:
        for path in self.answers_files():
            path.unlink(missing_ok=True)

    def failure(self, since: float = 0) -> str | None:
        """The traceback of the cell if it failed at or after `since` (seconds since the epoch).

        None if it did not.

        Raises:
            DamagedRecord: the file is truncated or edited, or is another cell's.
        """
        path = self._failure
        try:
            # a time that is still to come is of a clock that was wrong
            if not since <= path.stat().st_mtime <= time.time():
                return None
            failure = Failure.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DamagedRecord(
                f"{path} is damaged ({error}); delete it to run the cell again"
            ) from error
        if failure.identity.digest != self.identity.digest:
            raise DamagedRecord(
                f"{path} is that of another cell, {failure.identity.folder}; "
                "delete it to run the cell again"
            )
        return failure.traceback

    def write(
        self,
        results: Results,
        environment: Environment,
        samples: "pd.DataFrame",
        files: Path | None = None,
    ) -> None:
        """Store the finished cell, and delete its earlier failure and its files of answers.

        Args:
            files: folder with files that the task wrote, which are copied beside the record.
        """
        name, writing = self.identity.digest[:12], self._runs / ".writing"
        for place in (self.folder.parent, writing):
            place.mkdir(parents=True, exist_ok=True)
        # not mkdtemp: its folder, which becomes the cell's, would be closed to other users
        scratch = writing / f"{name}.{platform.node()}.{os.getpid()}"
        try:
            scratch.mkdir(exist_ok=True)
            if files is not None:
                shutil.copytree(files, scratch, dirs_exist_ok=True)
            samples.to_parquet(scratch / "samples.parquet", index=False)
            content = {
                "version": VERSION,
                **results.as_json(),
                "environment": environment.as_json(),
                "identity": self.identity.as_json(),
                "samples_sha256": hashlib.sha256(
                    (scratch / "samples.parquet").read_bytes()
                ).hexdigest(),
            }
            (scratch / "record.json").write_text(
                json.dumps(content | {"seal": digest(content)}, indent=1) + "\n"
            )
            for path in (scratch / "samples.parquet", scratch / "record.json", scratch):
                _flush(path)
            if not self.exists():
                shutil.rmtree(self.folder, ignore_errors=True)
                scratch.rename(self.folder)
                _flush(self.folder.parent)
        except OSError:
            if not self.exists():  # else another process stored it and removed our scratch folder
                raise
        finally:
            for left in writing.glob(f"{name}*"):  # also those of a killed process
                shutil.rmtree(left, ignore_errors=True)
        self._failure.unlink(missing_ok=True)
        self.forget_answers()

    def write_failure(
        self, traceback: str, environment: Environment, config: dict[str, Any]
    ) -> Path:
        """Store why the cell failed, and with which settings, next to its folder."""
        self._failure.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._failure.with_suffix(f".{os.getpid()}.writing")  # shards may fail together
        failure = Failure(
            identity=self.identity, traceback=traceback, environment=environment, config=config
        )
        scratch.write_text(json.dumps(failure.as_json(), indent=1) + "\n")
        _flush(scratch)
        scratch.rename(self._failure)
        return self._failure


class Store:
    """The cells in one results folder, which several processes may share.

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
                f"the results folder {root} cannot be written ({error}); "
                "set results=/another/folder"
            ) from error

    def cell(self, identity: Identity) -> StoredCell:
        return StoredCell(self.runs, identity)

    def records(self, damaged: list[str] | None = None) -> list[Record]:
        """The records of all finished cells, sorted by folder.

        Args:
            damaged: receives a message for each damaged cell.

        Raises:
            DamagedRecord: a cell is damaged, and `damaged` is None.
        """
        records = []
        for folder in sorted(self.runs.glob("[!.]*/*/*/*")):
            if not folder.is_dir() or any(
                part.startswith(".") for part in folder.relative_to(self.runs).parts
            ):
                continue
            try:
                if not os.access(folder, os.R_OK | os.X_OK):
                    raise DamagedRecord(f"this user may not read {folder}; ask its owner")
                records.append(read(folder))
            except DamagedRecord as error:
                if damaged is None:
                    raise
                damaged.append(str(error))
        return records


def _flush(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
