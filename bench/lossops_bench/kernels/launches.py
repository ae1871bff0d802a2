"""The launches that are reported: the library's own, at the shapes of a language model's head.

Rows are few where the classes are split among programs, and many where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lossops.gpu_layout import Logits, Spec
from lossops.statistics import STATISTICS, canonical, outputs
from lossops_bench.kernels.facts import Facts, facts_of
from lossops_bench.kernels.offline import Launch, pretending, target_of
from lossops_triton import primitives
from lossops_triton.fused import fused_statistics
from lossops_triton.pairs import KINDS
from lossops_triton.sparse import far_sums, near_products
from lossops_triton.statistics import (
    chunk_gradient,
    chunk_statistics,
    column_sums,
)
from lossops_triton.targets import add_targets

N, D, V = 1024, 2048, 32768
FEW = 2  # rows, so that each is split
CROSS_ENTROPY = canonical(("target", "lse"))
EVERY = canonical((*STATISTICS, "lse@2", "lse<0.5"))
ENTROPY = canonical(("target", "entropy", "max"))
SEVERAL = canonical(("target", "variance", "runner_up", "lse@2"))
EVERY_FUSED = tuple(name for name in EVERY if name != "below_target")
BF16 = torch.bfloat16


class Case(NamedTuple):
    """A launch to look at.

    Attributes:
        name: in the tables.
        kernel: its name; others that `run` launches are not this case's.
        run: calls the library's launch code.
        functions: exponentials, logarithms and divisions a logit that the formulas need.
        merges: the same for a row and step, where the state of the step joins that of the row.
        multiplies: whether its products must be the tensor cores' of the architecture.
        streams: whether its loop must load by 16 bytes.
        elements: constants of the launch whose product is the elements of a step of its main loop.
    """

    name: str
    kernel: str
    run: Callable[[], object]
    functions: float = 0.0
    merges: float = 0.0
    multiplies: bool = False
    streams: bool = False
    elements: tuple[str, ...] = ("BM", "BN", "ROWS", "BLOCK")


def compiled(case: Case, architecture: str) -> tuple[Launch, Facts]:
    """The case's launch on an architecture, and what it compiles to."""
    with pretending(architecture) as launches:
        case.run()
    launch = next((one for one in launches if one.name == case.kernel), None)
    if launch is None:
        names = ", ".join(one.name for one in launches) or "nothing"
        raise ValueError(f"{case.name} must launch {case.kernel}, got {names}")
    return launch, facts_of(launch.kernel, architecture)


def functions_a_logit(case: Case, launch: Launch, facts: Facts) -> float:
    """Exponentials and the like for each element of the main loop."""
    sizes = [launch.options[name] for name in case.elements if name in launch.options]
    threads = facts.warps * target_of(facts.architecture).warp_size
    return facts.functions * threads / math.prod(sizes)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _ids(n: int, k: int = 1) -> Tensor:
    return torch.zeros(n, k, dtype=torch.int64)


def _fused(
    names: Sequence[str] = CROSS_ENTROPY,
    *,
    n: int = N,
    softcap: float = 0.0,
    dtype: torch.dtype = BF16,
    d: int = D,
) -> None:
    taught = "teacher" in names
    fused_statistics(
        _empty(n, d, dtype=dtype), _empty(V, d, dtype=dtype), None, None, softcap, _ids(n),
        _empty(V) if taught else None, _empty(n, V, dtype=dtype) if taught else None, names,
    )  # fmt: skip


def _logits(dtype: torch.dtype, n: int, aligned: bool) -> Tensor:
    return _empty(n, V, dtype=dtype) if aligned else _empty(n, V + 1, dtype=dtype)[:, :V]


def _statistics(
    names: Sequence[str] = CROSS_ENTROPY,
    *,
    dtype: torch.dtype = torch.float32,
    n: int = N,
    aligned: bool = True,
    softcap: float = 0.0,
) -> None:
    r = _logits(dtype, n, aligned)
    teacher = _empty(n, V) if "teacher" in names else None
    chunk_statistics(Logits(r, softcap=softcap), _ids(n), _empty(V), teacher, names)


def gradient_spec(names: Sequence[str], n: int) -> Spec:
    """What a gradient of all of the statistics is made of, for n rows."""

    def of(output: str) -> Tensor:
        if output == "target":
            return _empty(n, 1)
        return (
            _ids(n)[:, 0]
            if output in ("argmax", "runner_up_index", "below_target_index")
            else (_empty(n))
        )

    listed = outputs(names)
    without = ("shift", "argmax", "runner_up_index", "below_target_index")
    coefficients = [None if name in without else of(name) for name in listed]
    teacher = _empty(n, V) if "teacher" in names else None
    return Spec(_ids(n), _empty(V), teacher, names, [of(name) for name in listed], coefficients)


def _gradient(
    names: Sequence[str] = CROSS_ENTROPY,
    *,
    dtype: torch.dtype = torch.float32,
    packed: torch.dtype | None = None,
    n: int = N,
    aligned: bool = True,
    softcap: float = 0.0,
) -> None:
    r = _logits(dtype, n, aligned)
    out = r if packed is None else r.view(packed)[:, :V]
    unit = _empty(1)[0] if packed == torch.float16 else None
    chunk_gradient(Logits(r, softcap=softcap), gradient_spec(names, n), out, unit=unit)


def _binary(kind: str) -> None:
    n, d, v = 64, 16, 4096
    x, w = torch.zeros(n, d, dtype=BF16), torch.zeros(v, d, dtype=BF16)
    primitives.linear_binary(
        x, w, None, _empty(1)[0], _ids(n), None, kind, [1.0, 0.0, 0.0], _empty(n), _empty(n, 1),
        _empty(n, d), torch.empty_like(w), None,
    )  # fmt: skip


def _log_sums_of_pairs() -> None:
    n, d, v = 256, 16, 4096
    x, w = torch.zeros(n, d, dtype=BF16), torch.zeros(v, d, dtype=BF16)
    primitives.linear_pair_statistics(x, w, _empty(1)[0], _ids(n))


def _gradient_of_pairs() -> None:
    n, d, v = 256, 16, 4096
    x, w = torch.zeros(n, d, dtype=BF16), torch.zeros(v, d, dtype=BF16)
    statistics = [_empty(n), _empty(n), _empty(v), _empty(v), _empty(n, 1)]
    coefficients = [_empty(n), _empty(v), torch.zeros(n, 1)]
    primitives.linear_pair_gradient(
        x, w, _empty(1)[0], _ids(n), statistics, coefficients, _empty(n, d), torch.empty_like(w)
    )


def _far() -> None:
    far_sums(torch.zeros(N, 4096), torch.ones(N), torch.ones(N), 64, 1024)


def _near() -> None:
    d, v, block = 256, 1024, 64
    near_products(
        torch.zeros(N, v), torch.ones(N), torch.ones(N // block, v, dtype=torch.bool),
        torch.zeros(N, d), torch.zeros(v, d, dtype=BF16), torch.zeros(N, d), torch.zeros(v, d),
        None, block,
    )  # fmt: skip


def _segments() -> None:
    n, d, v = 64, D, 4096
    add_targets(
        None, torch.zeros(v, d), torch.zeros(v), torch.zeros(n, d, dtype=BF16), None,
        _empty(v, d, dtype=BF16), _ids(n), torch.zeros(n, 1),
    )  # fmt: skip


def _fused_cases() -> list[Case]:
    def case(name: str, functions: float, merges: float, *names: object, **options: object) -> Case:
        return Case(
            f"fused{name}", "fused_statistics_kernel", lambda: _fused(*names, **options), functions,
            merges, multiplies=True, streams=True,
        )  # fmt: skip

    return [
        case("", 1, 1),
        case(", split", 1, 1, n=FEW),
        case(", float16", 1, 1, dtype=torch.float16),
        case(", ragged D", 1, 1, d=D + 8),
        case(", softcap", 3, 1, softcap=30.0),
        case(", entropy", 1, 4, ENTROPY),
        case(", several statistics", 4, 5, SEVERAL, softcap=30.0),
        case(", every statistic", 6, 10, EVERY_FUSED),
        case(", every statistic, split", 6, 10, EVERY_FUSED, n=FEW),
    ]


def _chunk_cases() -> list[Case]:
    def reads(
        name: str, functions: float, merges: float, *names: object, **options: object
    ) -> Case:
        return Case(
            f"statistics, {name}", "chunk_statistics_kernel",
            lambda: _statistics(*names, **options), functions, merges, streams=True,
        )  # fmt: skip

    def writes(name: str, functions: float, *names: object, **options: object) -> Case:
        return Case(
            f"gradient, {name}", "chunk_gradient_kernel", lambda: _gradient(*names, **options),
            functions, streams=True,
        )  # fmt: skip

    return [
        reads("float32", 1, 1),
        reads("float32, split", 1, 1, n=FEW),
        reads("float32, misaligned", 1, 1, aligned=False),
        reads("bfloat16", 1, 1, dtype=BF16),
        reads("bfloat16, misaligned", 1, 1, dtype=BF16, aligned=False),
        reads("softcap", 3, 1, softcap=30.0),
        reads("every statistic", 6, 10, EVERY),
        writes("float32", 1),
        writes("float32, misaligned", 1, aligned=False),
        writes("bfloat16", 1, dtype=BF16),
        writes("packed bfloat16", 1, packed=BF16),
        writes("packed float16", 1, packed=torch.float16),
        writes("softcap", 3, softcap=30.0),
        writes("every statistic", 6, EVERY),
    ]


def _other_cases() -> list[Case]:
    functions = {"sigmoid": 3, "hinge": 0, "gumbel": 8, "asymmetric": 8}
    few = N // 16

    def binary(kind: str) -> Case:
        return Case(
            f"binary, {kind}", "binary_kernel", lambda: _binary(kind), functions[kind], streams=True
        )

    def columns() -> None:
        column_sums(Logits(_empty(few, V)), gradient_spec(CROSS_ENTROPY, few), _empty(V), False)

    return [
        # of a row: four parts, and the logarithm
        Case("merge of parts", "merge_kernel", lambda: _fused(n=FEW), 5),
        Case("merge, every statistic", "merge_kernel", lambda: _fused(EVERY_FUSED, n=FEW), 10),
        Case("target logits", "target_logits_kernel", _fused),
        Case("segment add", "segment_add_kernel", _segments),
        Case("column sums", "column_sums_kernel", columns, 1),
        *map(binary, KINDS),
        Case("pairs, columns", "pair_columns_kernel", _log_sums_of_pairs, 1, 1),
        Case("pairs, gradient", "pair_gradient_kernel", _gradient_of_pairs, 2, streams=True),
        Case("far sums", "far_sums_kernel", _far),
        Case("near products, dx", "near_dx_kernel", _near),
        Case("near products, dw", "near_dw_kernel", _near),
    ]


def cases() -> dict[str, Case]:
    """All of them by name."""
    listed = [*_fused_cases(), *_chunk_cases(), *_other_cases()]
    return {case.name: case for case in listed}
