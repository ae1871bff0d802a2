"""The primitives of `lossops.reference` on a GPU: Triton kernels, and cuBLAS for dense products.

    logits_statistics, linear_statistics     statistics.py, fused.py
    linear_chunk_*, linear_negatives         chunk.py, lossops/gpu_linear.py around it
    linear_gradient                          slabs of classes of the same
    linear_binary, linear_pair_*             pairs.py, lossops/gpu_pairs.py around it
    far_sums, near_products                  sparse.py

Nothing but near and far waits for the device, sizes come from shapes alone, and no kernel uses
atomics or locks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lossops.gpu_linear import Kernels, LinearPrimitives, linear_products
from lossops.gpu_pairs import PairKernels, PairPrimitives
from lossops_triton.fused import fused_statistics, fuses
from lossops_triton.pairs import binary, pair_columns, pair_gradient
from lossops_triton.sparse import far_sums, near_products
from lossops_triton.statistics import chunk_gradient, chunk_statistics, column_sums
from lossops_triton.targets import add_targets

kernels = Kernels(chunk_statistics, chunk_gradient, column_sums, add_targets)
_linear = LinearPrimitives(kernels)
_pairs = PairPrimitives(kernels, PairKernels(binary, pair_columns, pair_gradient))

linear_binary = _pairs.linear_binary
linear_chunk_gradient = _linear.linear_chunk_gradient
linear_chunk_negatives = _linear.linear_chunk_negatives
linear_chunk_statistics = _linear.linear_chunk_statistics
linear_gradient = _linear.linear_gradient
linear_negatives = _linear.linear_negatives
linear_pair_gradient = _pairs.linear_pair_gradient
linear_pair_statistics = _pairs.linear_pair_statistics
logits_gradient = _linear.logits_gradient
logits_statistics = _linear.logits_statistics


def linear_statistics(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    softcap: float,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: Sequence[str],
) -> list[Tensor]:
    """Statistics straight from x and w: by one kernel where it can, else chunk by chunk of rows."""
    run = fused_statistics if fuses(x, w, names) else _linear.linear_statistics
    return run(x, w, b, scale, softcap, target, class_vector, teacher, names)


__all__ = [
    "far_sums",
    "linear_binary",
    "linear_chunk_gradient",
    "linear_chunk_negatives",
    "linear_chunk_statistics",
    "linear_gradient",
    "linear_negatives",
    "linear_pair_gradient",
    "linear_pair_statistics",
    "linear_products",
    "linear_statistics",
    "logits_gradient",
    "logits_statistics",
    "near_products",
]
