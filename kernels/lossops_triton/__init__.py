"""The primitives of `lossops.reference` on a GPU: Triton kernels, and cuBLAS for dense products.

    logits_statistics, linear_statistics     statistics.py, fused.py
    linear_chunk_*, linear_negatives         chunk.py around products by the vendor's library
    linear_gradient                          slabs of classes of the same
    linear_binary, linear_pair_*             pairs.py, on slabs
    far_sums, near_products                  sparse.py

Nothing but near and far waits for the device, sizes come from shapes alone, and no kernel uses
atomics or locks.
"""

from lossops_triton.linear import (
    linear_chunk_gradient,
    linear_chunk_negatives,
    linear_chunk_statistics,
    linear_gradient,
    linear_negatives,
    linear_products,
    linear_statistics,
    logits_gradient,
    logits_statistics,
)
from lossops_triton.pairs import linear_binary, linear_pair_gradient, linear_pair_statistics
from lossops_triton.sparse import far_sums, near_products

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
