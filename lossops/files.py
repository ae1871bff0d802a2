"""Tensors whose values lie in files, each file in the hands of one tensor at a time.

A lock on the file lasts as long as the memory that is mapped from it: what another tensor of this
process, or of another one, has mapped is refused, where two would overwrite each other's values.
Windows has no such lock.
"""

from __future__ import annotations

import gc
import math
import mmap
import sys
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lossops.shards import group_rank, spread_group


def mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose values are those of a file, made with zeros where there is none.

    Raises:
        ValueError: a file of another size, or one that another tensor is mapped from.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    size = math.prod(shape) * dtype.itemsize
    with path.open("a+b") as file:
        _lock(file, path)
        found = path.stat().st_size
        if found not in (0, size):
            raise ValueError(
                f"{path} must hold {size} bytes, for shape {shape} of {dtype}, got {found}; "
                "remove it, or name another"
            )
        file.truncate(size)
        # The map has a descriptor of its own, and with it the lock, until the tensor is gone.
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).reshape(shape)


def of_rank(path: Path, group: object) -> Path:
    """The path of this rank's part of what is spread over a group; None for no group."""
    return path if group is None else path.with_name(f"{path.name}.{group_rank(group)}")


class StateTensors:
    """Tensors of an optimizer's state, in memory or in files of a directory.

    Files are named by number of the parameter, name, and, where classes are spread, rank.
    """

    def __init__(self, directory: str | Path | None) -> None:
        self.directory = None if directory is None else Path(directory)
        self._files: dict[Path, Tensor] = {}

    def zeros_like(self, p: Tensor, number: int, name: str) -> Tensor:
        """Zeros of the shape and dtype of ``p``, the optimizer's parameter of this number."""
        if self.directory is None:
            return torch.zeros_like(p, memory_format=torch.contiguous_format)
        return self._file(p, number, name).zero_()

    def keep(self, value: Tensor, p: Tensor, number: int, name: str) -> Tensor:
        """A loaded ``value`` where such a tensor is to be."""
        return value if self.directory is None else self._file(p, number, name).copy_(value)

    def _file(self, p: Tensor, number: int, name: str) -> Tensor:
        assert self.directory is not None
        path = of_rank(self.directory / f"{number}.{name}", spread_group(p))
        if path not in self._files:
            self._files[path] = mapped(path, tuple(p.shape), p.dtype)
        return self._files[path]


def _lock(file: BinaryIO, path: Path) -> None:
    if sys.platform == "win32":
        return  # nobody looks after the file there
    import fcntl

    alone = fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        fcntl.flock(file, alone)
    except BlockingIOError:
        gc.collect()  # a deleted optimizer and its schedule hold each other until then
        try:
            fcntl.flock(file, alone)
        except BlockingIOError:
            raise ValueError(
                f"{path} must have one owner at a time, and a tensor of this process or of another "
                "is mapped from it; give each head, optimizer and process a path of its own, or "
                "delete what has this one"
            ) from None
