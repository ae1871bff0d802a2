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

from lossops.gpu_linear import Kernels
from lossops.gpu_pairs import GpuPrimitives, PairKernels
from lossops_triton.fused import fused_statistics, fuses
from lossops_triton.pairs import binary, pair_columns, pair_gradient
from lossops_triton.sparse import far_sums, near_products
from lossops_triton.statistics import chunk_gradient, chunk_statistics, column_sums
from lossops_triton.targets import add_targets


class TritonPrimitives(GpuPrimitives):
    """With a kernel that never stores logits, and those of near and far."""

    far_sums = staticmethod(far_sums)
    near_products = staticmethod(near_products)

    def linear_statistics(
        self,
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
        """Statistics straight from x and w: by one kernel where it can, else by chunks of rows."""
        run = fused_statistics if fuses(x, w, names) else super().linear_statistics
        return run(x, w, b, scale, softcap, target, class_vector, teacher, names)


primitives = TritonPrimitives(
    Kernels(chunk_statistics, chunk_gradient, column_sums, add_targets),
    PairKernels(binary, pair_columns, pair_gradient),
)
