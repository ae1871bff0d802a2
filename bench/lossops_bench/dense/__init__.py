"""Every loss of `lossops.catalogue` in plain PyTorch on stored logits, by the recipe's name."""

from lossops_bench.dense import distillation, heads, pairs, sequences, softmax
from lossops_bench.dense.table import DENSE, Dense, Draw

__all__ = ["DENSE", "Dense", "Draw", "distillation", "heads", "pairs", "sequences", "softmax"]
