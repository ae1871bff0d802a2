"""nn.Module faces of the functions; arguments are those of the functions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lossops.cross_entropy import cross_entropy, linear_cross_entropy, linear_log_prob
from lossops.linear import linear_loss
from lossops.pairwise import sigmoid_pairwise_loss, softmax_pairwise_loss


def check_keywords(
    module: nn.Module, options: Iterable[str], function: Callable[..., Any], *own: str
) -> None:
    """Raise a TypeError for options of a module that ``function`` does not take.

    Args:
        module: whose they are.
        options: their names.
        function: whose keywords they are to be.
        own: keywords that the module gives itself.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in own]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(
            f"{type(module).__name__} must get keywords among {', '.join(known)}, "
            f"got {', '.join(unknown)}"
        )


class _LinearHead(nn.Module):
    """A weight (V, D) and perhaps a bias (V,), initialised as in ``torch.nn.Linear``.

    Tensors among the options are its own, under ``tensors``: parameters are learned, others are
    buffers.
    """

    tensors: nn.Module

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.num_classes = in_features, num_classes
        tensors = {n: t for n, t in options.items() if isinstance(t, Tensor)}
        self.options = {n: o for n, o in options.items() if n not in tensors}
        self.owned = tuple(tensors)
        if tensors:
            self.tensors = nn.Module()
        for n, t in tensors.items():
            if isinstance(t, nn.Parameter):
                self.tensors.register_parameter(n, t)
            else:
                self.tensors.register_buffer(n, t)
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.linear_weight = nn.Parameter(torch.empty(num_classes, in_features, **kwargs))
        self.linear_bias: nn.Parameter | None = None
        if bias:
            self.linear_bias = nn.Parameter(torch.empty(num_classes, **kwargs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/√D, as ``torch.nn.Linear``."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def keywords(self) -> dict[str, Any]:
        """Options, tensors among them."""
        return {**self.options, **{name: getattr(self.tensors, name) for name in self.owned}}

    def extra_repr(self) -> str:
        """Sizes and options."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        bias = self.linear_bias is not None
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, bias={bias}{options}"
        )


class LinearCrossEntropyLoss(_LinearHead):
    """`lossops.linear_cross_entropy` with its own weight.

    Args:
        in_features: D.
        num_classes: V.
        bias: whether there is a bias (V,). Default: ``False``.
        device, dtype: of the parameters.
        weight: class weights (V,), kept as a buffer. Default: ``None``.
        options: keywords of `lossops.linear_cross_entropy`.

    Example:
        >>> import torch, lossops
        >>> head = lossops.LinearCrossEntropyLoss(8, 100, label_smoothing=0.1)
        >>> head(torch.randn(4, 8), torch.tensor([3, 1, 4, 1])).shape
        torch.Size([])
    """

    weight: Tensor | None

    def __init__(
        self, in_features: int, num_classes: int, *, weight: Tensor | None = None, **options: Any
    ) -> None:
        super().__init__(in_features, num_classes, **options)
        check_keywords(self, self.keywords, linear_cross_entropy, "linear_bias", "weight")
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor, **options: Any) -> Any:
        """Loss of ``input`` (..., D) and ``target``; keywords override those of the module."""
        return linear_cross_entropy(
            input,
            self.linear_weight,
            target,
            linear_bias=self.linear_bias,
            weight=self.weight,
            **{**self.keywords, **options},
        )


class LinearLogProb(_LinearHead):
    """`lossops.linear_log_prob` with its own weight.

    Args:
        in_features: D.
        num_classes: V.
        bias: whether there is a bias (V,). Default: ``False``.
        device, dtype: of the parameters.
        options: keywords of `lossops.linear_log_prob`.

    Example:
        >>> import torch, lossops
        >>> head = lossops.LinearLogProb(8, 100, entropy=True)
        >>> log_prob, entropy = head(torch.randn(4, 8), torch.tensor([3, 1, 4, 1]))
        >>> log_prob.shape, entropy.shape
        (torch.Size([4]), torch.Size([4]))
    """

    def __init__(self, in_features: int, num_classes: int, **options: Any) -> None:
        super().__init__(in_features, num_classes, **options)
        check_keywords(self, self.keywords, linear_log_prob, "linear_bias")

    def forward(self, input: Tensor, target: Tensor, **options: Any) -> Any:
        """log p of ``target`` (...), or with the entropy; keywords override those of the module."""
        return linear_log_prob(
            input,
            self.linear_weight,
            target,
            linear_bias=self.linear_bias,
            **{**self.keywords, **options},
        )


class LinearLoss(_LinearHead):
    """`lossops.linear_loss` with its own weight.

    Args:
        in_features: D.
        num_classes: V.
        loss_fn: F of `lossops.linear_loss`; of a module the parameters get gradients.
        bias: whether there is a bias (V,). Default: ``False``.
        device, dtype: of the weight and bias.
        options: keywords of `lossops.linear_loss`.

    Example:
        >>> import torch, lossops
        >>> head = lossops.LinearLoss(8, 100, lambda s, old: -(s.log_p - old).exp())
        >>> head(torch.randn(4, 8), torch.tensor([3, 1, 4, 1]), old=torch.zeros(4)).shape
        torch.Size([])
    """

    def __init__(
        self, in_features: int, num_classes: int, loss_fn: Callable[..., Tensor], **options: Any
    ) -> None:
        super().__init__(in_features, num_classes, **options)
        own = ("linear_bias", "row_inputs", "parameters")
        check_keywords(self, self.keywords, linear_loss, *own)
        self.loss_fn = loss_fn

    def forward(
        self,
        input: Tensor,
        target: Tensor | None,
        *,
        sample_weight: Tensor | None = None,
        **row_inputs: Tensor,
    ) -> Tensor:
        """Loss of ``input`` (..., D) and ``target``; further tensors go to ``loss_fn`` by row."""
        given = {} if sample_weight is None else {"sample_weight": sample_weight}
        parameters = tuple(self.loss_fn.parameters()) if isinstance(self.loss_fn, nn.Module) else ()
        return linear_loss(
            input,
            self.linear_weight,
            target,
            self.loss_fn,
            row_inputs=row_inputs,
            parameters=parameters,
            linear_bias=self.linear_bias,
            **{**self.keywords, **given},
        )


class CrossEntropyLoss(nn.Module):
    """`lossops.cross_entropy`, classes in the last dim.

    Args:
        weight: class weights (V,), kept as a buffer. Default: ``None``.
        options: keywords of `lossops.cross_entropy`.

    Example:
        >>> import torch, lossops
        >>> loss = lossops.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
        >>> loss(torch.randn(4, 100), torch.tensor([3, 1, 4, 1])).shape
        torch.Size([4])
    """

    weight: Tensor | None

    def __init__(self, *, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        self.options = options
        check_keywords(self, options, cross_entropy, "weight")
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, target: Tensor, **options: Any) -> Any:
        """Loss of ``logits`` (..., V) and ``target``; keywords override those of the module."""
        return cross_entropy(logits, target, weight=self.weight, **{**self.options, **options})


class _PairwiseLoss(nn.Module):
    """Logit scale and bias of a loss over pairs: given to each call, or owned."""

    def __init__(self, log_scale: float, bias: float | None, learnable: bool, **options: Any):
        super().__init__()
        self.learnable, self.options = learnable, options
        self.log_scale: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if learnable:
            self.log_scale = nn.Parameter(torch.tensor(log_scale))
            self.bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def _scale(self, given: float | Tensor | None) -> float | Tensor:
        if self.log_scale is not None:
            if given is not None:
                raise ValueError("logit_scale is the module's own (learnable=True); pass none")
            return self.log_scale.exp()
        if given is None:
            raise ValueError("logit_scale must be given, or owned by the module: learnable=True")
        return given

    def extra_repr(self) -> str:
        """Options."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"learnable={self.learnable}{options}"


class SigmoidPairwiseLoss(_PairwiseLoss):
    """`lossops.sigmoid_pairwise_loss`, called as open_clip's ``SigLipLoss``.

    Args:
        learnable: whether the module owns log t, from log 10, and b, from -10; otherwise both come
            with each call. Default: ``False``.
        options: keywords of `lossops.sigmoid_pairwise_loss`.

    Example:
        >>> import torch, lossops
        >>> loss = lossops.SigmoidPairwiseLoss(learnable=True)
        >>> x, w = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in "xw")
        >>> loss(x, w).backward()
        >>> sorted(name for name, _ in loss.named_parameters())
        ['bias', 'log_scale']
    """

    def __init__(self, *, learnable: bool = False, **options: Any) -> None:
        super().__init__(math.log(10.0), -10.0, learnable, **options)
        check_keywords(self, options, sigmoid_pairwise_loss)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        **options: Any,
    ) -> Any:
        """Loss of (N, D) and (M, D), in a dict as ``contrastive_loss`` where asked."""
        if self.bias is not None and logit_bias is not None:
            raise ValueError("logit_bias is the module's own (learnable=True); pass none")
        bias = logit_bias if self.bias is None else self.bias
        loss = sigmoid_pairwise_loss(
            image_features, text_features, self._scale(logit_scale), bias,
            **{**self.options, **options},
        )  # fmt: skip
        return {"contrastive_loss": loss} if output_dict else loss


class SoftmaxPairwiseLoss(_PairwiseLoss):
    """`lossops.softmax_pairwise_loss`, called as open_clip's ``ClipLoss``.

    Args:
        learnable: whether the module owns log t, from log(1 / 0.07); otherwise t comes with each
            call. Default: ``False``.
        options: keywords of `lossops.softmax_pairwise_loss`.

    Example:
        >>> import torch, lossops
        >>> loss = lossops.SoftmaxPairwiseLoss(label_smoothing=0.1)
        >>> x, w = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in "xw")
        >>> loss(x, w, logit_scale=10.0, output_dict=True)["contrastive_loss"].shape
        torch.Size([])
    """

    def __init__(self, *, learnable: bool = False, **options: Any) -> None:
        super().__init__(math.log(1 / 0.07), None, learnable, **options)
        check_keywords(self, options, softmax_pairwise_loss)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
        **options: Any,
    ) -> Any:
        """Loss of (N, D) and (M, D); a common bias would cancel and is not used."""
        loss = softmax_pairwise_loss(
            image_features, text_features, self._scale(logit_scale), **{**self.options, **options}
        )
        return {"contrastive_loss": loss} if output_dict else loss
