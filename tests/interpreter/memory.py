"""What every launch in the interpreter is held to, beside its numbers.

Importing this module repairs the interpreter (`repair`) and watches each load, store and atomic of
each launch; `Fault` is raised for

    out of bounds   an address that is no element of the tensor argument the pointer came from:
                    beside a view, between its rows, in another argument
    hazards         within a program, one lane's store to where another lane has loaded or stored,
                    or its load of what another has stored, without tl.debug_barrier() between;
                    one store that writes an address twice
    races           two programs of a launch at one address, unless both only read, or only add by
                    atomics

A lane is a place in a block: blocks of one shape and element size are taken to lie alike in the
threads of a program. What a compiler makes of shared memory, and weak ordering, is not modelled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import repair
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

READ, WRITE, ATOMIC = "reads", "writes", "atomically updates"
HERE = (__file__, repair.__file__)


class Fault(AssertionError):
    """A kernel touches memory as it must not."""


class Extent:
    """The bytes of a tensor argument's elements."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.name, self.shape = name, tuple(tensor.shape)
        self.first, self.item = tensor.data_ptr(), tensor.element_size()
        self.empty = tensor.numel() == 0
        dims: list[tuple[int, int]] = []  # (size, stride in bytes), outermost first
        of_dim = zip(self.shape, tensor.stride(), strict=True)
        for stride, size in sorted(((s, n) for n, s in of_dim if n > 1 and s), reverse=True):
            step = stride * self.item
            if dims and dims[-1][1] == size * step:
                dims[-1] = (dims[-1][0] * size, step)
            else:
                dims.append((size, step))
        self.dims = dims
        self.end = self.first + self.item + sum((n - 1) * step for n, step in dims)
        if self.empty:
            self.end = self.first

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        """Which of the addresses are elements."""
        rest = addresses.astype(np.int64) - self.first
        inside = np.full(rest.shape, not self.empty)
        for size, step in self.dims:
            inside &= (rest >= 0) & (rest < size * step)
            rest = rest % step
        return inside & (rest == 0)


class ArgumentPointer(tl.pointer_type):
    """A pointer that knows its argument, through all arithmetic and blocks of pointers."""

    def __init__(self, element: tl.dtype, extent: Extent) -> None:
        super().__init__(element)
        self.extent = extent


class Access(NamedTuple):
    """What one load, store or atomic of one program touched."""

    kind: str
    program: tuple[int, int, int]
    addresses: np.ndarray
    lanes: np.ndarray
    shape: tuple[int, ...]
    extent: Extent
    place: str
    low: int
    high: int

    def meets(self, low: int, high: int) -> bool:
        """Whether it touches anything near [low, high)."""
        return self.low < high and low < self.high

    def bytes_of(self, granule: int) -> np.ndarray:
        """Addresses in units of ``granule``, one for each unit of each element."""
        units = self.extent.item // granule
        first = self.addresses[:, None] // np.uint64(granule)
        return (first + np.arange(units, dtype=np.uint64)).reshape(-1)

    def disturbs(self, other: Access) -> bool:
        """Whether an element of it is one that another lane of ``other`` touched."""
        granule = min(self.extent.item, other.extent.item)
        ours, theirs = self.bytes_of(granule), other.bytes_of(granule)
        order = np.argsort(theirs, kind="stable")
        theirs = theirs[order]
        first, last = np.searchsorted(theirs, ours), np.searchsorted(theirs, ours, "right")
        shared = last > first
        if not shared.any():
            return False
        if (self.shape, self.extent.item) != (other.shape, other.extent.item):
            return True
        lane = other.lanes[order[np.minimum(first, len(order) - 1)]]
        return bool((shared & ((last - first > 1) | (lane != self.lanes))).any())


@dataclass
class Launch:
    """A launch of a kernel, while it runs and after."""

    kernel: str
    names: dict[int, str]
    bytes_read: int = 0
    bytes_written: int = 0
    programs: list[tuple[int, int, int]] = field(default_factory=list)
    program: tuple[int, int, int] = (0, 0, 0)
    accesses: list[Access] = field(default_factory=list)
    since_barrier: list[Access] = field(default_factory=list)

    def begin(self, program: tuple[int, int, int]) -> None:
        """A program starts."""
        self.programs.append(program)
        self.program = program
        self.since_barrier = []

    def touch(self, pointers: TensorHandle, mask: Any, kind: str) -> None:
        """Record an access of a block of pointers, or raise."""
        shape = pointers.data.shape
        lanes = np.flatnonzero(np.broadcast_to(np.asarray(mask.data), shape))
        if not lanes.size:
            return
        addresses = pointers.data.reshape(-1)[lanes]
        extent = getattr(pointers.dtype, "extent", None)
        if extent is None:
            raise Fault(f"program {self.program} {kind} by no pointer of an argument, at {place()}")
        inside = extent.holds(addresses)
        if not inside.all():
            at = (int(addresses[~inside][0]) - extent.first) / extent.item
            raise Fault(
                f"out of bounds: program {self.program} {kind} element {at:g} of '{extent.name}' "
                f"{extent.shape}, {(~inside).sum()} of {len(inside)} lanes, at {place()}"
            )
        if kind == READ:
            self.bytes_read += addresses.size * extent.item
        else:
            self.bytes_written += addresses.size * extent.item
        low, high = int(addresses.min()), int(addresses.max()) + extent.item
        access = Access(
            kind, self.program, addresses, lanes, shape, extent, place(), low, high
        )  # fmt: skip
        self._check_lanes(access)
        self.accesses.append(access)
        self.since_barrier.append(access)

    def _check_lanes(self, access: Access) -> None:
        if access.kind == WRITE and np.unique(access.addresses).size < access.addresses.size:
            raise Fault(f"hazard: one store writes an address twice, at {access.place}")
        for before in self.since_barrier:
            if ATOMIC in (access.kind, before.kind) or {access.kind, before.kind} == {READ}:
                continue
            if access.meets(before.low, before.high) and access.disturbs(before):
                raise Fault(
                    f"hazard: program {self.program} {access.kind} at {access.place} what other "
                    f"lanes touched at {before.place}, with no tl.debug_barrier() between"
                )

    def end(self) -> None:
        """All programs are done: look for two at one address."""
        written = {id(a.extent): a.extent for a in self.accesses if a.kind != READ}.values()
        near = [
            a for a in self.accesses if any(a.meets(e.first, e.end) for e in written)
        ]  # fmt: skip
        self.accesses, self.since_barrier = [], []
        if len(self.programs) > 1 and near:
            _check_programs(near)


def _check_programs(accesses: list[Access]) -> None:
    granule = min(a.extent.item for a in accesses)
    units = [a.bytes_of(granule) for a in accesses]
    owner = np.repeat(np.arange(len(accesses)), [len(u) for u in units])
    unit = np.concatenate(units)
    order = np.argsort(unit, kind="stable")
    unit, owner = unit[order], owner[order]
    ids = {program: i for i, program in enumerate({a.program for a in accesses})}
    program = np.array([ids[a.program] for a in accesses])[owner]
    start = np.flatnonzero(np.r_[True, unit[1:] != unit[:-1]])
    several = np.minimum.reduceat(program, start) != np.maximum.reduceat(program, start)
    has = {
        kind: np.logical_or.reduceat(np.array([a.kind == kind for a in accesses])[owner], start)
        for kind in (READ, WRITE, ATOMIC)
    }
    bad = np.flatnonzero(several & (has[WRITE] | (has[READ] & has[ATOMIC])))
    if not bad.size:
        return
    end = np.r_[start[1:], unit.size][bad[0]]
    group = [accesses[i] for i in owner[start[bad[0]] : end]]
    one = next(a for a in group if a.kind != READ)
    other = next(a for a in group if a.program != one.program)
    at = (int(unit[start[bad[0]]]) * granule - one.extent.first) // one.extent.item
    raise Fault(
        f"race: program {one.program} {one.kind} element {at} of '{one.extent.name}' at "
        f"{one.place}, which program {other.program} {other.kind} at {other.place}"
    )


def place() -> str:
    """The line of the kernel that is running."""
    frame = sys._getframe(1)
    while frame.f_back and (
        frame.f_code.co_filename in HERE or "/triton/" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


class _Watch:
    """The launch under way, the order of its programs, and whoever listens."""

    launch: Launch | None = None
    seed: int | None = None
    order: dict[tuple[int, int, int], tuple[int, int, int]]
    listeners: list[list[Launch]]

    def __init__(self) -> None:
        self.order, self.listeners = {}, []


_watch = _Watch()


@contextmanager
def shuffled(seed: int | None) -> Iterator[None]:
    """Programs of launches inside run in an order of the seed, in that of the grid for None."""
    before, _watch.seed = _watch.seed, seed
    try:
        yield
    finally:
        _watch.seed = before


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """The launches inside, as they end: kernels, programs, bytes."""
    seen: list[Launch] = []
    _watch.listeners.append(seen)
    try:
        yield seen
    finally:
        _watch.listeners.remove(seen)


def _names(value: Any, name: str) -> Iterator[tuple[int, str]]:
    """Identities and names of the tensors in an argument."""
    if isinstance(value, tuple):
        for i, each in enumerate(value):
            yield from _names(each, f"{name}[{i}]")
    elif isinstance(value, interpreter.TensorDescriptor):
        yield from _names(value.base, name)
    elif isinstance(value, Tensor):
        yield id(value), name


_stock_launch = GridExecutor.__call__


def _launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
    arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
    names = dict(pair for name, value in arguments.items() for pair in _names(value, name))
    launch = _watch.launch = Launch(self.fn.__name__, names)
    try:
        with np.errstate(all="ignore"):
            _stock_launch(self, *args, **kwargs)
        launch.end()
    finally:
        _watch.launch = None
    for seen in _watch.listeners:
        seen.append(launch)


_argument = interpreter._implicit_cvt


def _named_argument(value: Any) -> Any:
    found = _argument(value)
    if isinstance(value, Tensor) and _watch.launch is not None:
        extent = Extent(value, _watch.launch.names.get(id(value), "an argument"))
        found.handle.dtype = ArgumentPointer(found.type.element_ty, extent)
    return found


_set_grid = InterpreterBuilder.set_grid_dim
_set_program = InterpreterBuilder.set_grid_idx


def _grid(self: InterpreterBuilder, *dim: int) -> None:
    _set_grid(self, *dim)
    programs = list(np.ndindex(*dim))
    if _watch.seed is not None:
        order = np.random.default_rng(_watch.seed).permutation(len(programs))
        _watch.order = dict(zip(programs, (programs[i] for i in order), strict=True))


def _program(self: InterpreterBuilder, *program: int) -> None:
    if _watch.seed is not None:
        program = _watch.order[program]
    _set_program(self, *program)
    if _watch.launch is not None:
        _watch.launch.begin(program)


def _watched(operation: Callable[..., Any], kind: str, pointers: int, mask: int) -> Any:
    """An operation of the builder; ``pointers`` and ``mask`` are the places of its arguments."""

    def watched(self: InterpreterBuilder, *args: Any, **kwargs: Any) -> Any:
        if _watch.launch is not None:
            _watch.launch.touch(args[pointers], args[mask], kind)
        return operation(self, *args, **kwargs)

    return watched


def _barrier(self: InterpreterBuilder) -> None:
    if _watch.launch is not None:
        _watch.launch.since_barrier = []


def _lock(self: InterpreterBuilder, *args: Any) -> None:
    raise Fault("who holds a lock is not known here, and no kernel of ours takes one")


def _install() -> None:
    builder = InterpreterBuilder
    builder.set_grid_dim, builder.set_grid_idx = _grid, _program
    builder.create_masked_load = _watched(builder.create_masked_load, READ, 0, 1)
    builder.create_masked_store = _watched(builder.create_masked_store, WRITE, 0, 2)
    builder.create_atomic_rmw = _watched(builder.create_atomic_rmw, ATOMIC, 1, 3)
    builder.create_atomic_cas = _lock
    builder.create_barrier = _barrier
    interpreter._implicit_cvt = _named_argument
    GridExecutor.__call__ = _launch


_install()
