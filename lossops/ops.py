"""torch.library schemas, their implementations and fakes. No autograd here: see `lossops.autograd`.

Each op runs a whole schedule, so a compiler sees one node. Tensors that are not wanted come back
empty. Schemas are one for all backends; the ``backend`` argument says who computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossops import backends, gram, near_far_sweep
from lossops.inputs import counted_rows
from lossops.near_far import NearFar, NearFarReport
from lossops.recipes import CrossEntropyTerms, cross_entropy_outputs, cross_entropy_rows
from lossops.reference import accumulate_dtype
from lossops.schedules import (
    Head,
    Needs,
    RowFunction,
    flatten_none,
    two_sweeps_gradient,
    without_autocast,
)
from lossops.statistics import INDEX_OUTPUTS, outputs

HEAD = (
    "Tensor x, Tensor w, Tensor? b, Tensor? scale, float softcap, Tensor? target, "
    "Tensor? class_vector, Tensor? teacher, str[] names"
)
LOGITS = "Tensor logits, Tensor? target, Tensor? class_vector, Tensor? teacher, str[] names"
TERMS = "Tensor? nll, Tensor? lse, Tensor? smooth, Tensor? taught, Tensor? square"
NEAR = (  # 0: dense gradients
    "float near_threshold=0., float near_target_error=0., bool near_certificate=False"
)

library = torch.library.Library("lossops", "DEF")
library.define(f"linear_statistics({HEAD}, str backend) -> Tensor[]")
library.define(
    f"linear_gradient({HEAD}, Tensor[] statistics, Tensor?[] coefficients, bool[] needs, "
    f"str backend, {NEAR}) -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"linear_cross_entropy({HEAD}, {TERMS}, bool[] needs, SymInt chunk_rows, str backend, {NEAR})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(f"logits_statistics({LOGITS}, str backend) -> Tensor[]")
library.define(
    f"logits_gradient({LOGITS}, Tensor[] statistics, Tensor?[] coefficients, str backend) -> Tensor"
)
library.define(
    "gram_statistics(Tensor x, Tensor w, Tensor? b, Tensor target)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "gram_gradient(Tensor x, Tensor w, Tensor? b, Tensor target, Tensor mean, Tensor gram, "
    "Tensor[] given, bool[] needs) -> (Tensor, Tensor, Tensor)"
)


def _primitives(backend: str, x: Tensor) -> Any:
    return backends.select(backend, x.device, x.dtype).primitives()


def _apart(found: list[Tensor]) -> list[Tensor]:
    """Tensors that share no memory, which results of an op may not; a kernel's are rows of one."""
    return [t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for t in found]


def check_target(target: Tensor | None, num_classes: int) -> None:
    """Raise an IndexError for ids outside [-1, V) of a CPU tensor; other devices are not synced."""
    if target is None or target.device.type != "cpu" or not target.numel():
        return
    low, high = (int(t) for t in torch.aminmax(target))
    if low < -1 or high >= num_classes:
        # `inputs.class_ids` makes V of negative ids, since -1 stands for ignored rows here.
        found = high if high > num_classes else f"{num_classes} or negative"
        raise IndexError(
            f"target must hold class ids in [0, {num_classes}) or ignore_index, got one that is "
            f"{'negative' if low < -1 else found}"
        )


def _linear_statistics(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    softcap: float,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: list[str],
    backend: str,
) -> list[Tensor]:
    check_target(target, w.shape[0])
    head = Head(x, w, b, scale, softcap, target, class_vector, teacher, names)
    return _apart(_primitives(backend, x).linear_statistics(*head))


def _linear_gradient(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    softcap: float,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: list[str],
    statistics: list[Tensor],
    coefficients: list[Tensor | None],
    needs: list[bool],
    backend: str,
    near_threshold: float = 0.0,
    near_target_error: float = 0.0,
    near_certificate: bool = False,
) -> tuple[Tensor, ...]:
    head = Head(x, w, b, scale, softcap, target, class_vector, teacher, names)
    call = (head, statistics, coefficients, Needs(*needs), _primitives(backend, x))
    near = NearFar(near_threshold, near_target_error, near_certificate)
    found = (
        near_far_sweep.two_sweeps_gradient(*call, near) if near.on else two_sweeps_gradient(*call)
    )
    return tuple(flatten_none(found, x))


@dataclass(frozen=True)
class CrossEntropyCall:
    """What a sweep of cross-entropy is told.

    Attributes:
        wanted: outputs that may get a coefficient.
        row_function: losses and coefficients of some rows.
        argmax: (N,), filled by it, or None.
        index: the rows that count, None for all.
    """

    wanted: list[str]
    row_function: RowFunction
    argmax: Tensor | None
    index: Tensor | None

    @staticmethod
    def of(head: Head, terms: CrossEntropyTerms) -> CrossEntropyCall:
        """Raises an IndexError as `check_target`."""
        x, target, num_classes = head.x, head.target, head.w.shape[0]
        check_target(target, num_classes)
        order = outputs(head.names)
        argmax = x.new_full((x.shape[0],), -1, dtype=torch.int64) if "argmax" in order else None

        def row_function(
            stats: list[Tensor], rows: slice | Tensor
        ) -> tuple[Tensor, list[Tensor | None]]:
            found = dict(zip(order, stats, strict=True))
            losses, coefficients, best = cross_entropy_rows(
                found, terms.rows(rows), None if target is None else target[rows], num_classes
            )
            if argmax is not None and best is not None:
                argmax[rows] = best
            return losses, [coefficients.get(name) for name in order]

        index = counted_rows(target) if argmax is None else None  # ignored rows cost nothing
        wanted = cross_entropy_outputs(head.names)
        return CrossEntropyCall(wanted, row_function, argmax, index)


def _linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    softcap: float,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: list[str],
    nll: Tensor | None,
    lse: Tensor | None,
    smooth: Tensor | None,
    taught: Tensor | None,
    square: Tensor | None,
    needs: list[bool],
    chunk_rows: int,
    backend: str,
    near_threshold: float = 0.0,
    near_target_error: float = 0.0,
    near_certificate: bool = False,
) -> tuple[Tensor, ...]:
    head = Head(x, w, b, scale, softcap, target, class_vector, teacher, names)
    terms = CrossEntropyTerms(nll, lse, smooth, taught, square)
    call = CrossEntropyCall.of(head, terms)
    losses, gradients, report = near_far_sweep.any_one_sweep(
        head, call.wanted, call.row_function, Needs(*needs), _primitives(backend, x), chunk_rows,
        call.index, NearFar(near_threshold, near_target_error, near_certificate), terms.row_scale,
    )  # fmt: skip
    return tuple(flatten_none([losses.sum(), call.argmax, *gradients, report], x))


def _logits_statistics(
    logits: Tensor,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: list[str],
    backend: str,
) -> list[Tensor]:
    check_target(target, logits.shape[1])
    primitives = _primitives(backend, logits)
    return _apart(primitives.logits_statistics(logits, target, class_vector, teacher, names))


def _logits_gradient(
    logits: Tensor,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: list[str],
    statistics: list[Tensor],
    coefficients: list[Tensor | None],
    backend: str,
) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _primitives(backend, logits).logits_gradient(
        logits, target, class_vector, teacher, names, statistics, coefficients, out
    )
    return out


def _fake_statistics(x: Tensor, target: Tensor | None, names: Sequence[str]) -> list[Tensor]:
    acc, n = accumulate_dtype(x.dtype), x.shape[0]
    found = []
    for name in outputs(names):
        if name == "target":
            assert target is not None
            found.append(x.new_empty(n, target.shape[1], dtype=acc))
        else:
            dtype = torch.int64 if name in INDEX_OUTPUTS else acc
            found.append(x.new_empty(n, dtype=dtype))
    return found


def _fake_linear_statistics(*args: object) -> list[Tensor]:
    x, target, names = args[0], args[5], args[8]
    return _fake_statistics(x, target, names)  # type: ignore[arg-type]


def _fake_logits_statistics(*args: object) -> list[Tensor]:
    logits, target, names = args[0], args[1], args[4]
    return _fake_statistics(logits, target, names)  # type: ignore[arg-type]


def _fake_linear_gradient(
    x: Tensor, w: Tensor, b: Tensor | None, scale: Tensor | None, *rest: object
) -> tuple[Tensor, ...]:
    needs = Needs(*rest[7])  # type: ignore[misc]
    acc = accumulate_dtype(x.dtype)
    none = x.new_empty(0)
    return (
        x.new_empty(x.shape) if needs.dx else none,
        w.new_empty(w.shape) if needs.dw else none.clone(),
        b.new_empty(b.shape) if needs.db and b is not None else none.clone(),
        x.new_empty((), dtype=acc) if needs.dscale else none.clone(),
    )


def _fake_linear_cross_entropy(
    x: Tensor, w: Tensor, b: Tensor | None, scale: Tensor | None, *rest: object
) -> tuple[Tensor, ...]:
    needs, names = Needs(*rest[10]), rest[4]  # type: ignore[misc]
    near = NearFar(*rest[13:16])  # type: ignore[arg-type]
    acc = accumulate_dtype(x.dtype)
    argmax = x.new_empty(x.shape[0] if "max" in names else 0, dtype=torch.int64)  # type: ignore[operator]
    return (
        x.new_empty((), dtype=acc),
        argmax if "max" in names else x.new_empty(0),  # type: ignore[operator]
        x.new_empty(x.shape if needs.dx else 0, dtype=acc if needs.dx else x.dtype),
        x.new_empty(w.shape if needs.dw else 0, dtype=acc if needs.dw else x.dtype),
        x.new_empty(w.shape[0] if needs.db else 0, dtype=acc if needs.db else x.dtype),
        x.new_empty(() if needs.dscale else 0, dtype=acc if needs.dscale else x.dtype),
        x.new_empty(len(NearFarReport._fields), dtype=acc) if near.on else x.new_empty(0),
    )


def _fake_logits_gradient(logits: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _gram_statistics(x: Tensor, w: Tensor, b: Tensor | None, target: Tensor) -> tuple[Tensor, ...]:
    check_target(target, w.shape[0])
    found, moments = gram.statistics(x, w, b, target)
    return (*found, *moments)


def _gram_gradient(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    mean: Tensor,
    matrix: Tensor,
    given: list[Tensor],
    needs: list[bool],
) -> tuple[Tensor, ...]:
    moments, gradients = gram.ClassMoments(mean, matrix), gram.Statistics(*given)
    want_x, want_w, want_b = needs
    found = gram.gradient(x, w, b, target, moments, gradients, (want_x, want_w, want_b))
    return tuple(flatten_none(found, x))


def _fake_gram_statistics(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor
) -> tuple[Tensor, ...]:
    wide, n, e = gram.wide_dtype(x.device), x.shape[0], x.shape[1] + (b is not None)
    shapes = (tuple(target.shape), (n,), (n,), (e,), (e, e))
    return tuple(x.new_empty(shape, dtype=wide) for shape in shapes)


def _fake_gram_gradient(
    x: Tensor, w: Tensor, b: Tensor | None, *rest: object
) -> tuple[Tensor, ...]:
    needs: list[bool] = rest[-1]  # type: ignore[assignment]
    found = [t if need else None for t, need in zip((x, w, b), needs, strict=True)]
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in found)


def in_full_precision(implementation: Callable[..., object]) -> Callable[..., object]:
    """The implementation of an op without autocast inside."""

    @functools.wraps(implementation)
    def run(x: Tensor, *arguments: object) -> object:
        with without_autocast(x.device):
            return implementation(x, *arguments)

    return run


for _name, _implementation, _fake in (
    ("linear_statistics", _linear_statistics, _fake_linear_statistics),
    ("linear_gradient", _linear_gradient, _fake_linear_gradient),
    ("linear_cross_entropy", _linear_cross_entropy, _fake_linear_cross_entropy),
    ("logits_statistics", _logits_statistics, _fake_logits_statistics),
    ("logits_gradient", _logits_gradient, _fake_logits_gradient),
    ("gram_statistics", _gram_statistics, _fake_gram_statistics),
    ("gram_gradient", _gram_gradient, _fake_gram_gradient),
):
    library.impl(_name, in_full_precision(_implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lossops::{_name}", _fake, lib=library)
