"""lossops: fused large-output losses. A loss is a small function of row statistics."""

from lossops.cross_entropy import (
    CrossEntropyOutput,
    cross_entropy,
    linear_cross_entropy,
    linear_log_prob,
)
from lossops.linear import linear_loss, linear_statistics
from lossops.modules import CrossEntropyLoss, LinearCrossEntropyLoss, LinearLogProb, LinearLoss
from lossops.schedules import LinearLossOptions
from lossops.statistics import RowStatistics

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyOutput",
    "LinearCrossEntropyLoss",
    "LinearLogProb",
    "LinearLoss",
    "LinearLossOptions",
    "RowStatistics",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_loss",
    "linear_statistics",
]
