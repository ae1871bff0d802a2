"""Every access of an interpreted kernel, looked at: bounds, races, missing barriers, bytes.

    with checked(seed=1) as traffic:
        launch()

``seed`` shuffles the order of the programs, which must not matter. Kernels have no atomics: one is
an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getcallargs, getfullargspec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import repair
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


class Fault(AssertionError):
    """What a kernel must not do."""


class Extent(NamedTuple):
    """The memory of a tensor argument."""

    first: int
    end: int
    name: str
    tensor: torch.Tensor


class Access(NamedTuple):
    """What one load or store of one program touched."""

    addresses: np.ndarray
    lanes: np.ndarray
    width: int  # lanes in all
    program: int
    writes: bool
    place: str


class Traffic:
    """What the launches inside `checked` did."""

    def __init__(self, seed: int | None) -> None:
        self.order = None if seed is None else np.random.default_rng(seed)
        self.read = self.written = 0  # bytes
        self.extents: list[Extent] = []
        self.log: list[Access] = []
        self.fresh: list[Access] = []  # stores of this program since its last barrier
        self.program = 0

    def touch(self, pointers: Any, mask: Any, writes: bool) -> None:
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        all_lanes = np.broadcast_to(pointers.data, shape).reshape(-1)
        lanes = np.flatnonzero(np.broadcast_to(mask.data, shape).reshape(-1))
        if not lanes.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        one = Access(all_lanes[lanes], lanes, all_lanes.size, self.program, writes, _place())
        self._in_bounds(one, size)
        if writes:
            self.written += lanes.size * size
            if np.unique(one.addresses).size != lanes.size:
                raise Fault(f"one store writes an address from several lanes, at {one.place}")
        else:
            self.read += lanes.size * size
        for store in self.fresh:
            _, mine, its = np.intersect1d(one.addresses, store.addresses, return_indices=True)
            other_lanes = store.width != one.width or (lanes[mine] != store.lanes[its]).any()
            if mine.size and other_lanes:
                raise Fault(
                    f"{one.place} touches what {store.place} wrote from other lanes, and no "
                    "tl.debug_barrier() is between"
                )
        if writes:
            self.fresh.append(one)
        self.log.append(one)

    def _in_bounds(self, one: Access, size: int) -> None:
        inside = np.zeros(one.addresses.shape, bool)
        for extent in self.extents:
            inside |= (one.addresses >= extent.first) & (one.addresses + size <= extent.end)
        if not inside.all():
            raise Fault(
                f"out of bounds by {(~inside).sum()} of {inside.size} lanes at {one.place}, of "
                f"{', '.join(f'{e.name} {tuple(e.tensor.shape)}' for e in self.extents)}"
            )

    def races(self) -> None:
        """An address that one program writes and another one touches."""
        if not self.log:
            return
        addresses = np.concatenate([a.addresses for a in self.log]).astype(np.int64)
        index = np.repeat(np.arange(len(self.log)), [a.addresses.size for a in self.log])
        order = np.argsort(addresses, kind="stable")
        addresses, index = addresses[order], index[order]
        program = np.array([a.program for a in self.log])[index]
        writes = np.array([a.writes for a in self.log])[index]
        starts = np.flatnonzero(np.r_[True, addresses[1:] != addresses[:-1]])
        several = np.maximum.reduceat(program, starts) != np.minimum.reduceat(program, starts)
        bad = np.flatnonzero(np.logical_or.reduceat(writes, starts) & several)
        if bad.size:
            same = np.flatnonzero(addresses == addresses[starts[bad[0]]])
            places = sorted({f"{self.log[i].place} ({self.log[i].program})" for i in index[same]})
            raise Fault(f"a race between programs at {len(bad)} addresses: {'; '.join(places)}")


_traffic: Traffic | None = None


def _place() -> str:
    """The line of the kernel."""
    frame = sys._getframe(1)
    while frame.f_back and (
        "/triton/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _extents(name: str, value: Any) -> Iterator[Extent]:
    """Memory of a tensor, of a descriptor's base, of those in a tuple."""
    if isinstance(value, tuple | list):
        for i, each in enumerate(value):
            yield from _extents(f"{name}[{i}]", each)
    elif hasattr(value, "base") and hasattr(value, "block_shape"):
        yield from _extents(name, value.base)
    elif isinstance(value, torch.Tensor) and value.numel():
        last = sum((n - 1) * abs(s) for n, s in zip(value.shape, value.stride(), strict=True))
        first = value.data_ptr()
        yield Extent(first, first + (last + 1) * value.element_size(), name, value)


def _launch(self: GridExecutor, *arguments: Any, **keywords: Any) -> None:
    """Each program in turn; CPU tensors are used where they lie."""
    known = getfullargspec(self.fn).args
    keywords = {k: v for k, v in keywords.items() if k in known}
    given = getcallargs(self.fn, *arguments, **keywords)
    scope = interpreter._patch_lang(self.fn)
    try:
        converted = {k: v if k in self.constexprs else repair.argument(v) for k, v in given.items()}
        grid = self.grid(given) if callable(self.grid) else self.grid
        grid = (*grid, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*grid)
        programs = list(np.ndindex(*grid))
        if _traffic is not None:
            _traffic.extents = [e for name, v in given.items() for e in _extents(name, v)]
            _traffic.log = []
            if _traffic.order is not None:
                _traffic.order.shuffle(programs)
        for program in programs:
            if _traffic is not None:
                _traffic.program, _traffic.fresh = int(np.ravel_multi_index(program, grid)), []
            interpreter.interpreter_builder.set_grid_idx(*map(int, program))
            with np.errstate(all="ignore"):
                self.fn(**converted)
        if _traffic is not None:
            _traffic.races()
    finally:
        scope.restore()


_load, _store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store


def _checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **more: Any) -> Any:
    if _traffic is not None:
        _traffic.touch(pointers, mask, False)
    return _load(self, pointers, mask, *rest, **more)


def _checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
    if _traffic is not None:
        _traffic.touch(pointers, mask, True)
    return _store(self, pointers, value, mask, *rest, **more)


def _barrier(self: Any) -> None:
    if _traffic is not None:
        _traffic.fresh = []


def _no_atomics(self: Any, *arguments: Any, **keywords: Any) -> None:
    raise Fault(f"an atomic at {_place()}: the order of a sum would not be fixed")


@contextmanager
def checked(seed: int | None = None) -> Iterator[Traffic]:
    """Every launch inside is checked; raises a `Fault` at the first one."""
    global _traffic
    before, _traffic = _traffic, Traffic(seed)
    try:
        yield _traffic
    finally:
        _traffic = before


GridExecutor.__call__ = _launch
InterpreterBuilder.create_masked_load = _checked_load
InterpreterBuilder.create_masked_store = _checked_store
InterpreterBuilder.create_barrier = _barrier
InterpreterBuilder.create_atomic_rmw = _no_atomics
InterpreterBuilder.create_atomic_cas = _no_atomics
