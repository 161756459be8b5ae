"""A cache of the image encoder's output, in memory and on disk, each with a limit in bytes."""

import contextlib
import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

Tensors = dict[str, Tensor]
log = logging.getLogger(__name__)
_PATIENCE = 60  # seconds to wait for the folder's lock, which is held for milliseconds


def image_key(pixels: Tensor | Iterable[Tensor], identity: str) -> str:
    """Hash of an image's pixel tensors (values, shapes, dtypes) and of its encoder's `identity`."""
    tensors = [pixels] if isinstance(pixels, Tensor) else list(pixels)
    return _digest({str(number): tensor for number, tensor in enumerate(tensors)}, identity)


@dataclass
class Counts:
    """What the cache did so far. A damaged entry is also a miss."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    memory_evictions: int = 0
    disk_evictions: int = 0
    damaged: int = 0


@dataclass
class EncodeCache:
    """Tensors by key. In both tiers the least recently used entries are deleted first.

    Several processes may share the folder. If it cannot be used (full disk, no permission, a
    network file system that fails), the cache goes on in memory alone, with a warning: a cell
    must not fail for it.

    Args:
        limit_bytes: limit of the tensors in memory; 0 keeps none.
        folder: disk-tier folder; None disables it.
        disk_limit_bytes: limit of the files in the folder.
        device: of the tensors in memory and of those returned.

    Raises:
        ValueError: a negative limit.
    """

    limit_bytes: int
    folder: Path | None = None
    disk_limit_bytes: int = 0
    device: torch.device | str = "cpu"
    counts: Counts = field(default_factory=Counts, init=False)
    bytes: int = field(default=0, init=False)  # of the tensors in memory
    _entries: OrderedDict[str, Tensors] = field(default_factory=OrderedDict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.limit_bytes < 0 or self.disk_limit_bytes < 0:
            raise ValueError(
                "limits of the cache are bytes, at least 0: "
                f"{self.limit_bytes}, {self.disk_limit_bytes}"
            )
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self._give_up_disk(error)

    def fetch(
        self, key: str, encode: Callable[[], Tensors], names: Set[str] = frozenset()
    ) -> Tensors:
        """The tensors of a key. Calls `encode` if neither tier has all of `names`.

        A hit returns the same bits in the same layout (contiguous) as a miss. The tensors are
        shared: do not write into them.

        Args:
            key: from `image_key` if there is a folder, where it names a file; else any text.
            encode: returns the tensors of the key; those not in the entry yet are added to it.
            names: tensors that the entry must hold.
        """
        tensors = self._entries.get(key, {})
        if key in self._entries and names <= tensors.keys():
            self.counts.memory_hits += 1
            self._entries.move_to_end(key)
            return tensors
        on_disk = self._read(key)
        tensors = tensors | (on_disk or {})
        if on_disk is not None and names <= tensors.keys():
            self.counts.disk_hits += 1
        else:
            self.counts.misses += 1
            # copies, since a view would keep a larger storage alive; known tensors stay as they are
            tensors |= {
                name: tensor.detach().to(self.device).clone(memory_format=torch.contiguous_format)
                for name, tensor in encode().items()
                if name not in tensors
            }
            self._write(key, tensors)
        self._remember(key, tensors)
        return tensors

    def clear(self) -> None:
        """Free the memory; entries on disk stay."""
        self.counts.memory_evictions += len(self._entries)
        self._entries.clear()
        self.bytes = 0

    def _remember(self, key: str, tensors: Tensors) -> None:
        size = _size(tensors)
        if size > self.limit_bytes:
            return
        self.bytes -= _size(self._entries.pop(key, {}))
        while self.bytes + size > self.limit_bytes:
            self.bytes -= _size(self._entries.popitem(last=False)[1])
            self.counts.memory_evictions += 1
        self._entries[key] = tensors
        self.bytes += size

    def _read(self, key: str) -> Tensors | None:
        if self.folder is None:
            return None
        path = self.folder / f"{key}.safetensors"
        try:
            content = path.read_bytes()  # in one go: another process may replace the file
            tensors = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            if header.get("__metadata__", {}).get("sha256") != _digest(tensors, key):
                raise SafetensorError("its content is not what was written under this name")
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # used now
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            self.counts.damaged += 1
            log.warning("the cache entry %s is damaged (%s) and encoded again", path, error)
            return None
        except OSError as error:
            self._give_up_disk(error)
            return None
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _give_up_disk(self, error: OSError) -> None:
        log.warning(
            "the cache folder %s cannot be used (%s): this process keeps encoded images in memory "
            "only, and encodes more often",
            self.folder,
            error,
        )
        self.folder = None

    def _write(self, key: str, tensors: Tensors) -> None:
        """Write an entry in one step, after deleting the oldest to make room for it."""
        if self.folder is None:
            return
        content = save(
            {name: tensor.cpu() for name, tensor in tensors.items()},
            {"sha256": _digest(tensors, key)},
        )
        if len(content) > self.disk_limit_bytes:
            return
        scratch = self.folder / f"{key}.writing"
        try:
            # a process that is suspended while it holds the lock must not stop the others
            with FileLock(self.folder / "lock", timeout=_PATIENCE):
                self._make_room(len(content))
                scratch.write_bytes(content)
                scratch.rename(self.folder / f"{key}.safetensors")
        except OSError as error:
            self._give_up_disk(error)

    def _make_room(self, size: int) -> None:
        """Delete half-written files of killed processes, then the oldest, for `size` bytes."""
        assert self.folder is not None
        for left in self.folder.glob("*.writing"):
            left.unlink()
        entries = [(entry.stat(), entry) for entry in self.folder.glob("*.safetensors")]
        excess = sum(stat.st_size for stat, _ in entries) + size - self.disk_limit_bytes
        for stat, entry in sorted(entries, key=lambda entry: entry[0].st_mtime_ns):
            if excess <= 0:
                break
            entry.unlink()
            excess -= stat.st_size
            self.counts.disk_evictions += 1


def _size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _digest(tensors: Tensors, *words: str) -> str:
    digest = hashlib.sha256(repr(words).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
