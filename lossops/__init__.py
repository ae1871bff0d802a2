"""lossops: fused large-output losses. A loss is a small function of row statistics."""

from lossops import catalogue, optim, samplers
from lossops.checkpoint import ShardedState
from lossops.cross_entropy import (
    CrossEntropyOutput,
    cross_entropy,
    linear_cross_entropy,
    linear_log_prob,
)
from lossops.factored import FactoredSphericalHead
from lossops.gradient_cache import gradient_cache
from lossops.linear import linear_loss, linear_statistics
from lossops.margins import ArcFace, CombinedMargin, CosFace
from lossops.modules import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    LinearLogProb,
    LinearLoss,
    SigmoidPairwiseLoss,
    SoftmaxPairwiseLoss,
)
from lossops.multilabel import (
    linear_asymmetric_loss,
    linear_binary_cross_entropy,
    linear_cosine_contrastive_loss,
)
from lossops.near_far import NearFarReport
from lossops.pairwise import sigmoid_pairwise_loss, softmax_pairwise_loss
from lossops.partial_fc import PartialFC
from lossops.sampled import nce_loss, negative_sampling_loss, sampled_softmax_loss
from lossops.samplers import SampledClasses
from lossops.schedules import LinearLossOptions
from lossops.spherical import (
    linear_log_spherical_softmax_loss,
    linear_log_taylor_softmax_loss,
    linear_spherical_loss,
    linear_spherical_mse_loss,
    linear_spherical_z_loss,
    log_spherical_softmax_loss,
    log_taylor_softmax_loss,
    spherical_loss,
    spherical_mse_loss,
    spherical_z_loss,
)
from lossops.statistics import RowStatistics

__version__ = "0.1.0"

__all__ = [
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "CrossEntropyLoss",
    "CrossEntropyOutput",
    "FactoredSphericalHead",
    "LinearCrossEntropyLoss",
    "LinearLogProb",
    "LinearLoss",
    "LinearLossOptions",
    "NearFarReport",
    "PartialFC",
    "RowStatistics",
    "SampledClasses",
    "ShardedState",
    "SigmoidPairwiseLoss",
    "SoftmaxPairwiseLoss",
    "catalogue",
    "cross_entropy",
    "gradient_cache",
    "linear_asymmetric_loss",
    "linear_binary_cross_entropy",
    "linear_cosine_contrastive_loss",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_log_spherical_softmax_loss",
    "linear_log_taylor_softmax_loss",
    "linear_loss",
    "linear_spherical_loss",
    "linear_spherical_mse_loss",
    "linear_spherical_z_loss",
    "linear_statistics",
    "log_spherical_softmax_loss",
    "log_taylor_softmax_loss",
    "nce_loss",
    "negative_sampling_loss",
    "optim",
    "sampled_softmax_loss",
    "samplers",
    "sigmoid_pairwise_loss",
    "softmax_pairwise_loss",
    "spherical_loss",
    "spherical_mse_loss",
    "spherical_z_loss",
]
