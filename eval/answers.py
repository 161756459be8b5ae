"""Stores the answers of a running cell on disk, so that an interrupted cell can be resumed."""

import dataclasses
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic, Self, TextIO, TypeVar

from pydantic import TypeAdapter

from secateur.records import digest

A = TypeVar("A", bound=Any)  # a dataclass
Key = tuple[str, int]  # task and document
log = logging.getLogger(__name__)


class Unanswered(RuntimeError):
    """This shard has answered its documents, but other documents of the cell have no answer."""


class Answers(dict[Key, A], Generic[A]):
    """Answers by task and document. Setting one appends a line, with its digest, to a file.

    Args:
        path: this process's file. New answers are appended; truncated, edited and foreign lines
            are dropped with a warning.
        kind: the dataclass of an answer.
        cell: digest of the cell's identity. It is part of each line's digest, so that lines of
            another cell are dropped as well.
        others: files of other processes that run the same cell. Only their intact lines are read.
    """

    def __init__(self, path: Path, kind: type[A], cell: str, others: Iterable[Path] = ()) -> None:
        super().__init__()
        self._cell = cell
        self._adapter = TypeAdapter(kind)
        for other in others:
            self._read(other)
        whole, damaged = self._read(path)
        if damaged:
            log.warning(
                "%d lines of %s are torn, edited or of another cell; "
                "their documents are asked again",
                damaged,
                path,
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
        self._file.write(json.dumps(line | {"digest": self._digest(line)}) + "\n")
        self._file.flush()

    def _read(self, path: Path) -> tuple[list[bytes], int]:
        """Read a file's answers. Returns its intact lines and the number of damaged lines."""
        whole, damaged = [], 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            try:
                content = json.loads(line)
                if content.pop("digest") != self._digest(content) or not line.endswith(b"\n"):
                    raise ValueError
                answer = self._adapter.validate_python(content["answer"])
                self.update({(content["task"], content["doc_id"]): answer})
                whole.append(line)
            except (ValueError, KeyError, TypeError, AttributeError):
                damaged += 1
        return whole, damaged

    def _digest(self, line: dict[str, Any]) -> str:
        return digest({"cell": self._cell, **line})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()
