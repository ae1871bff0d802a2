# fmt: off
"""Signatures of the catalogue, written from its table by `python tests/test_docs.py`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lossops.catalogue.distillation import dino_center as dino_center
from lossops.catalogue.heads import adaptive_lambda as adaptive_lambda
from lossops.catalogue.recipe import RECIPES as RECIPES
from lossops.catalogue.recipe import CatalogueModule as CatalogueModule
from lossops.catalogue.recipe import Recipe as Recipe
from lossops.catalogue.selection import previous_tokens as previous_tokens
from lossops.catalogue.selection import ramp as ramp
from lossops.catalogue.selection import running_log_partition as running_log_partition
from lossops.catalogue.tokens import min_k_scores as min_k_scores
from lossops.schedules import LinearLossOptions

HELPERS: tuple[str, ...]
__all__: list[str]

def linear_focal_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, gamma: float | Tensor = 2.0,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearFocalLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, gamma: float | Tensor = 2.0, bias: bool = False,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_dual_focal_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, gamma: float | Tensor,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearDualFocalLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, gamma: float | Tensor | None = None,
        bias: bool = False, device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_poly_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *,
    epsilon: float | Tensor | Sequence[float] = 1.0, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, sample_weight: Tensor | None = None, reduction: str = 'mean',
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    softcap: float | None = None, near_threshold: float | str | None = None,
    class_group: Any = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearPolyLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, epsilon: float | Tensor | Sequence[float] = 1.0,
        bias: bool = False, device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_poly_focal_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, epsilon: float | Tensor = 1.0,
    gamma: float | Tensor = 2.0, linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearPolyFocalLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, epsilon: float | Tensor = 1.0,
        gamma: float | Tensor = 2.0, bias: bool = False, device: Any = None, dtype: Any = None,
        **options: Any,
    ) -> None: ...

def linear_encouraging_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, log_end: float = 0.75,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearEncouragingLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, log_end: float = 0.75, bias: bool = False,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_squentropy_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, rescale: float | Tensor = 1.0,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearSquentropyLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, rescale: float | Tensor = 1.0, bias: bool = False,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_max_sup_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, lam: float | Tensor = 0.1,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearMaxSupLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, lam: float | Tensor = 0.1, bias: bool = False,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_stable_max_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, sample_weight: Tensor | None = None, reduction: str = 'mean',
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    softcap: float | None = None, near_threshold: float | str | None = None,
    class_group: Any = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearStableMaxLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_logit_penalty_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, beta: float | Tensor = 0.002,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearLogitPenaltyLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, beta: float | Tensor = 0.002, bias: bool = False,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_confidence_penalty_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, beta: float | Tensor,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearConfidencePenaltyLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, beta: float | Tensor | None = None,
        bias: bool = False, device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_brier_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, sample_weight: Tensor | None = None, reduction: str = 'mean',
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    softcap: float | None = None, near_threshold: float | str | None = None,
    class_group: Any = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearBrierLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_bayesian_flow_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, time: Tensor, accuracy: float,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearBayesianFlowLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, time: Tensor | None = None,
        accuracy: float | None = None, bias: bool = False, device: Any = None, dtype: Any = None,
        **options: Any,
    ) -> None: ...

def decoupled_contrastive_loss(
    first: Tensor, second: Tensor, *, temperature: float | Tensor = 0.1,
    weight_temperature: float | None = None, reduction: str = 'mean',
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

def nt_xent_margin_loss(
    first: Tensor, second: Tensor, *, temperature: float | Tensor = 0.03, margin: float = 0.1,
    angular_margin: float = 0.0, reduction: str = 'mean', options: LinearLossOptions | None = None,
    backend: str = 'auto',
) -> Tensor: ...

def debiased_contrastive_loss(
    first: Tensor, second: Tensor, *, temperature: float | Tensor = 0.5, tau_plus: float = 0.1,
    reduction: str = 'mean', options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

def hard_negative_contrastive_loss(
    first: Tensor, second: Tensor, *, beta: float, temperature: float | Tensor = 0.5,
    tau_plus: float = 0.1, reduction: str = 'mean', options: LinearLossOptions | None = None,
    backend: str = 'auto',
) -> Tensor: ...

def linear_logit_adjusted_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, log_prior: Tensor, tau: float = 1.0,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, near_threshold: float | str | None = None,
    class_group: Any = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearLogitAdjustedLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, log_prior: Tensor | None = None, tau: float = 1.0,
        bias: bool = False, device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_logit_clip_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, tau: float = 1.0,
    clipped_norm: float | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, near_threshold: float | str | None = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearLogitClipLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, tau: float = 1.0, clipped_norm: float | None = None,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_shared_covariance_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, covariance: Tensor,
    strength: float = 1.0, linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    near_threshold: float | str | None = None, options: LinearLossOptions | None = None,
    backend: str = 'auto',
) -> Tensor: ...

class LinearSharedCovarianceLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, covariance: Tensor | None = None,
        strength: float = 1.0, bias: bool = False, device: Any = None, dtype: Any = None,
        **options: Any,
    ) -> None: ...

def linear_adaptive_ldr_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, lam: Tensor, margin: float = 1.0,
    weight: Tensor | None = None, sample_weight: Tensor | None = None, reduction: str = 'mean',
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearAdaptiveLdrLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, lam: Tensor | None = None, margin: float = 1.0,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_cos_face_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, scale: float = 64.0,
    margin: float = 0.4, filter_above: float | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearCosFaceLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, scale: float = 64.0, margin: float = 0.4,
        filter_above: float | None = None, device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_arc_face_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, scale: float = 64.0,
    margin: float = 0.5, straight_through: bool = False, filter_above: float | None = None,
    guard: bool = True, weight: Tensor | None = None, sample_weight: Tensor | None = None,
    reduction: str = 'mean', ignore_index: int | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearArcFaceLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, scale: float = 64.0, margin: float = 0.5,
        straight_through: bool = False, filter_above: float | None = None, guard: bool = True,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_combined_margin_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, scale: float = 64.0, m1: float = 1.0,
    m2: float = 0.3, m3: float = 0.2, straight_through: bool = False,
    filter_above: float | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearCombinedMarginLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, scale: float = 64.0, m1: float = 1.0,
        m2: float = 0.3, m3: float = 0.2, straight_through: bool = False,
        filter_above: float | None = None, device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_gumbel_loss(
    input: Tensor, linear_weight: Tensor, positives: Any, *, most: float = 10.0,
    pos_weight: Tensor | None = None, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, sample_weight: Tensor | None = None, reduction: str = 'mean',
    logit_scale: float | Tensor | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearGumbelLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, most: float = 10.0,
        pos_weight: Tensor | None = None, bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_normalized_focal_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, gamma: float = 0.5,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearNormalizedFocalLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, gamma: float = 0.5, bias: bool = False,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_single_label_asymmetric_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, gamma_pos: float = 0.0,
    gamma_neg: float = 4.0, label_smoothing: float = 0.1, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, sample_weight: Tensor | None = None, reduction: str = 'mean',
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    softcap: float | None = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearSingleLabelAsymmetricLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, gamma_pos: float = 0.0, gamma_neg: float = 4.0,
        label_smoothing: float = 0.1, bias: bool = False, device: Any = None, dtype: Any = None,
        **options: Any,
    ) -> None: ...

def ge2e_loss(
    embeddings: Tensor, *, scale: float | Tensor = 10.0, bias: float | Tensor = -5.0,
    kind: str = 'softmax', reduction: str = 'mean', options: LinearLossOptions | None = None,
    backend: str = 'auto',
) -> Tensor: ...

def linear_pairwise_logistic_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, sample_weight: Tensor | None = None, reduction: str = 'mean',
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    softcap: float | None = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearPairwiseLogisticLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_hasa_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, false_negatives: Tensor | None = None,
    false_weights: Tensor | None = None, tau: float = 0.05, margin: float = 1.0,
    least: float = 1.0, sample_weight: Tensor | None = None, reduction: str = 'mean',
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearHasaLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, false_negatives: Tensor | None = None,
        false_weights: Tensor | None = None, tau: float = 0.05, margin: float = 1.0,
        least: float = 1.0, device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_comp_sum_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, tau: float | Tensor = 1.0,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearCompSumLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, tau: float | Tensor = 1.0, bias: bool = False,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_generalized_cross_entropy_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, q: float | Tensor = 0.7,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearGeneralizedCrossEntropyLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, q: float | Tensor = 0.7, bias: bool = False,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_mae_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, sample_weight: Tensor | None = None, reduction: str = 'mean',
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    softcap: float | None = None, near_threshold: float | str | None = None,
    class_group: Any = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearMaeLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_sum_exp_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, sample_weight: Tensor | None = None, reduction: str = 'mean',
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    softcap: float | None = None, near_threshold: float | str | None = None,
    class_group: Any = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearSumExpLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_normalized_cross_entropy_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, sample_weight: Tensor | None = None, reduction: str = 'mean',
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    softcap: float | None = None, near_threshold: float | str | None = None,
    class_group: Any = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearNormalizedCrossEntropyLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_reverse_cross_entropy_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, floor: float = 0.0001,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearReverseCrossEntropyLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, floor: float = 0.0001, bias: bool = False,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_normalized_generalized_cross_entropy_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, q: float = 0.7,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearNormalizedGeneralizedCrossEntropyLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, q: float = 0.7, bias: bool = False,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_active_passive_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0, active: str = 'normalized_cross_entropy',
    passive: str = 'reverse_cross_entropy', linear_bias: Tensor | None = None,
    weight: Tensor | None = None, sample_weight: Tensor | None = None, reduction: str = 'mean',
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    softcap: float | None = None, near_threshold: float | str | None = None,
    class_group: Any = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearActivePassiveLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, alpha: float | Tensor = 1.0,
        beta: float | Tensor = 1.0, active: str = 'normalized_cross_entropy',
        passive: str = 'reverse_cross_entropy', bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_ldr_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, lam: float = 1.0, margin: float = 2.0,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearLdrLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, lam: float = 1.0, margin: float = 2.0,
        bias: bool = False, device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_distillation_loss(
    input: Tensor, linear_weight: Tensor, teacher: Any, *, kind: str = 'kl',
    temperature: float = 1.0, beta: float = 0.5, linear_bias: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean',
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearDistillationLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, kind: str = 'kl', temperature: float = 1.0,
        beta: float = 0.5, bias: bool = False, device: Any = None, dtype: Any = None,
        **options: Any,
    ) -> None: ...

def linear_dino_loss(
    input: Tensor, linear_weight: Tensor, teacher: Any, *, center: Tensor,
    teacher_temperature: float, student_temperature: float = 0.1,
    linear_bias: Tensor | None = None, sample_weight: Tensor | None = None,
    reduction: str = 'mean', logit_scale: float | Tensor | None = None,
    softcap: float | None = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearDinoLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, center: Tensor | None = None,
        teacher_temperature: float | None = None, student_temperature: float = 0.1,
        bias: bool = False, device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_top_k_distillation_loss(
    input: Tensor, linear_weight: Tensor, ids: Tensor, *, log_probs: Tensor, tail: str = 'bucket',
    temperature: float = 1.0, linear_bias: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean',
    logit_scale: float | Tensor | None = None, near_threshold: float | str | None = None,
    class_group: Any = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearTopKDistillationLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, log_probs: Tensor | None = None,
        tail: str = 'bucket', temperature: float = 1.0, bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_error_norm_truncation_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, threshold: float,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearErrorNormTruncationLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, threshold: float | None = None, bias: bool = False,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_error_norm_fraction_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, fraction: float,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearErrorNormFractionLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, fraction: float | None = None, bias: bool = False,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_sovr_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, fraction: float, lam: float | Tensor,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearSovrLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, fraction: float | None = None,
        lam: float | Tensor | None = None, bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_unlikelihood_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, candidates: Tensor,
    alpha: float = 1.0, floor: float = 1e-05, linear_bias: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearUnlikelihoodLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, candidates: Tensor | None = None,
        alpha: float = 1.0, floor: float = 1e-05, bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_number_token_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, numbers: dict[int, float],
    lam: float = 0.3, kind: str = 'wasserstein', linear_bias: Tensor | None = None,
    weight: Tensor | None = None, sample_weight: Tensor | None = None, reduction: str = 'mean',
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    near_threshold: float | str | None = None, options: LinearLossOptions | None = None,
    backend: str = 'auto',
) -> Tensor: ...

class LinearNumberTokenLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, numbers: dict[int, float] | None = None,
        lam: float = 0.3, kind: str = 'wasserstein', bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_crammer_singer_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, margin: float | Tensor = 1.0,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearCrammerSingerLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, margin: float | Tensor = 1.0, bias: bool = False,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_one_vs_rest_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, sample_weight: Tensor | None = None, reduction: str = 'mean',
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    softcap: float | None = None, near_threshold: float | str | None = None,
    class_group: Any = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearOneVsRestLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_meco_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, log_partition: Tensor,
    linear_bias: Tensor | None = None, weight: Tensor | None = None,
    sample_weight: Tensor | None = None, reduction: str = 'mean', ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    near_threshold: float | str | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearMecoLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, log_partition: Tensor | None = None,
        bias: bool = False, device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_npo_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, reference_log_prob: Tensor,
    beta: float = 0.1, reduction: str = 'mean', linear_bias: Tensor | None = None,
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    softcap: float | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearNpoLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, reference_log_prob: Tensor | None = None,
        beta: float = 0.1, bias: bool = False, device: Any = None, dtype: Any = None,
        **options: Any,
    ) -> None: ...

def linear_dpo_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, reference_log_prob: Tensor,
    beta: float = 0.1, reduction: str = 'mean', linear_bias: Tensor | None = None,
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    softcap: float | None = None, class_group: Any = None,
    options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearDpoLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, reference_log_prob: Tensor | None = None,
        beta: float = 0.1, bias: bool = False, device: Any = None, dtype: Any = None,
        **options: Any,
    ) -> None: ...

def linear_simpo_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, beta: float, gamma: float,
    reduction: str = 'mean', linear_bias: Tensor | None = None, ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    class_group: Any = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearSimpoLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, beta: float | None = None,
        gamma: float | None = None, bias: bool = False, device: Any = None, dtype: Any = None,
        **options: Any,
    ) -> None: ...

def linear_orpo_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, lam: float, reduction: str = 'mean',
    linear_bias: Tensor | None = None, ignore_index: int | None = None,
    logit_scale: float | Tensor | None = None, softcap: float | None = None,
    class_group: Any = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearOrpoLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, lam: float | None = None, bias: bool = False,
        device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_masked_diffusion_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, masked: Tensor,
    level: Tensor | None = None, rate: Tensor | None = None, kind: str = 'lambda',
    linear_bias: Tensor | None = None, logit_scale: float | Tensor | None = None,
    softcap: float | None = None, near_threshold: float | str | None = None,
    class_group: Any = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearMaskedDiffusionLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, masked: Tensor | None = None,
        level: Tensor | None = None, rate: Tensor | None = None, kind: str = 'lambda',
        bias: bool = False, device: Any = None, dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_uniform_kl_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, sample_weight: Tensor | None = None, reduction: str = 'mean',
    ignore_index: int | None = None, logit_scale: float | Tensor | None = None,
    softcap: float | None = None, near_threshold: float | str | None = None,
    class_group: Any = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearUniformKlLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...

def linear_edit_invariant_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, ngrams: tuple[int, ...],
    floor: float = -20.0, gumbel: bool = False, linear_bias: Tensor | None = None,
    reduction: str = 'mean', logit_scale: float | Tensor | None = None,
    softcap: float | None = None, options: LinearLossOptions | None = None, backend: str = 'auto',
) -> Tensor: ...

class LinearEditInvariantLoss(CatalogueModule):
    def __init__(self,
        in_features: int, num_classes: int, *, ngrams: tuple[int, ...] | None = None,
        floor: float = -20.0, gumbel: bool = False, bias: bool = False, device: Any = None,
        dtype: Any = None, **options: Any,
    ) -> None: ...
