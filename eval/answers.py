"""The answers of a running cell on disk, so that the next run of the cell goes on from there."""

import dataclasses
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic, Self, TextIO, TypeVar

from pydantic import TypeAdapter

from secateur.store import digest

A = TypeVar("A", bound=Any)  # a dataclass
Key = tuple[str, int]  # task and document
log = logging.getLogger(__name__)


class Unanswered(RuntimeError):
    """A shard has answered its documents, and others of the cell have no answer yet."""


class Answers(dict[Key, A], Generic[A]):
    """Answers by task and document; setting one appends it to a file, a line each with its own digest.

    Args:
        path: this process's file, taken up where it ends; a line torn off by a kill, or edited, is dropped with a warning.
        kind: the answers' class.
        others: files of other processes at work on the same cell, read as far as they are whole.
    """

    def __init__(self, path: Path, kind: type[A], others: Iterable[Path] = ()) -> None:
        super().__init__()
        self._adapter = TypeAdapter(kind)
        for other in others:
            self._read(other)
        whole, damaged = self._read(path)
        if damaged:
            log.warning(
                "%d lines of %s are torn or edited; their documents are asked again", damaged, path
            )
            scratch = path.with_suffix(".writing")
            scratch.write_bytes(b"".join(whole))
            scratch.rename(path)
        self._path = path
        self._file: TextIO | None = None

    def __setitem__(self, key: Key, answer: A) -> None:
        super().__setitem__(key, answer)
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a")
        line = {"task": key[0], "doc_id": key[1], "answer": dataclasses.asdict(answer)}
        self._file.write(json.dumps(line | {"digest": digest(line)}) + "\n")
        self._file.flush()

    def _read(self, path: Path) -> tuple[list[bytes], int]:
        """Take in the whole lines of a file; returns them, and how many others there are."""
        whole, damaged = [], 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            try:
                content = json.loads(line)
                if content.pop("digest") != digest(content) or not line.endswith(b"\n"):
                    raise ValueError
                self.update(
                    {
                        (content["task"], content["doc_id"]): self._adapter.validate_python(
                            content["answer"]
                        )
                    }
                )
                whole.append(line)
            except (ValueError, KeyError, TypeError, AttributeError):
                damaged += 1
        return whole, damaged

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()
