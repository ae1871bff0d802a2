"""A classifier over millions of classes: normalised centres, margins, a sample of the classes.

    c_nj = cos(x_n, w_j)      z_ny = s ψ(c_ny),  z_nj = s c_nj      loss = mean_n CE(z_n, y_n)

over all classes, or over a sample that holds the targets of the batch. With a process group every
rank holds a range of the classes and sees the features of all ranks: per chunk of rows one exchange
merges the statistics of the shards.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossops.autograd import apply
from lossops.distributed import (
    GatherRows,
    ScaledGradient,
    SummedGradient,
    from_all,
    gather_rows,
    wanting,
)
from lossops.files import mapped, of_rank
from lossops.inputs import check_devices, check_float, class_ids, head_inputs
from lossops.linear import row_factors, swept_losses
from lossops.margins import CosFace, Margin
from lossops.reference import accumulate_dtype
from lossops.reference_sampling import stream_key
from lossops.rows import select_normalized_rows, select_rows
from lossops.samplers import positions, sample_keeping
from lossops.schedules import LinearLossOptions, without_autocast
from lossops.shards import mark_spread, shards_of
from lossops.statistics import RowStatistics, canonical, outputs
from lossops.topk import TopK, at_most, best_of, best_of_ranks, no_candidates

BLOCK = 8192
"""Classes at a time where all are visited."""


class PartialFC(nn.Module):
    """Softmax over cosines to class centres with a margin, over all classes or a sample of them.

    loss = mean_n [log(e^{s ψ(c_ny)} + Σ_{j ∈ S, j ≠ y} e^{s c_nj}) - s ψ(c_ny)],   c = cosines

    S holds the targets of the batch and classes drawn uniformly, ``sample_rate`` of all of them (or
    as many as the batch has rows, where that is more: they might all be targets, and no step waits
    to count them), new ones in every training step. Logits of S are computed a chunk at a time;
    centres outside S are neither read nor written.

    With ``class_group`` each of R ranks holds ceil(V / R) classes, the last one the rest, and gives
    its own features and labels, any number of them. The loss is that of the batch of all ranks, on
    every rank; the gradients of the features are R times its gradient, so that DDP's mean over
    ranks is the gradient; those of the centres are the gradient itself. Each rank draws its part of
    S from its own V_r classes: max(N, sample_rate V_r) of them, at most V_r, N being the rows of
    all ranks, whose targets may lie on one of them.

    Args:
        dim: D.
        num_classes: V, of all ranks.
        sample_rate: part of the classes in S; 1 takes them all. Default: ``1.0``.
        margin: ψ, s and a filter: `CosFace`, `ArcFace` or `CombinedMargin`; None for
            ``CosFace(64, 0.4)``. Default: ``None``.
        class_group: process group over whose ranks the classes are spread. Default: ``None``.
        sparse: whether the gradient of the centres is a sparse tensor of the rows in S; None where
            ``sample_rate`` is below 1. Default: ``None``.
        learn_scale: whether s is learned, as e^``log_scale``. Default: ``False``.
        weight_device: where the centres are, if not where the features are. Default: ``None``.
        weight_file: file the centres are mapped from, made where there is none; its values are
            kept. Ranks of ``class_group`` add their number to the name; what else has the file
            mapped already is refused. Default: ``None``.
        seed: names the sequence of samples. Default: ``0``.
        options: schedule and memory. Default: ``None``.
        backend: ``"auto"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.
            Default: ``'auto'``.
        device: of the centres. Default: ``None``.
        dtype: of the centres. Default: ``None``.

    Attributes:
        weight: centres of this rank, (V_r, D), of any length; drawn from N(0, 0.01²).

    Raises:
        ValueError, TypeError: arguments that do not fit. IndexError: a label outside [0, V).

    Note:
        Memory beyond the centres, in values, for |S| classes of a rank and N rows of all: 3 |S| D
        for the rows and their gradients, N D, and a chunk of N |S| logits of at most 136 MiB. While
        N exceeds sample_rate V_r that is 4 N D: what a rank holds grows with the batch of all
        ranks, as the features it gathers do, never with V.

    Example:
        >>> import torch, lossops
        >>> head = lossops.PartialFC(16, 10_000, sample_rate=0.1)
        >>> optimizer = lossops.optim.RowSGD(head.parameters(), lr=0.1, momentum=0.9)
        >>> x, y = torch.randn(8, 16), torch.randint(10_000, (8,))
        >>> head(x, y).backward()
        >>> head.weight.grad.coalesce().values().shape
        torch.Size([1000, 16])
        >>> optimizer.step()
        >>> head.topk(x, 5).indices.shape
        torch.Size([8, 5])

    Reference:
        An and others, "Partial FC: training 10 million identities on a single machine", 2020,
        arXiv 2010.05222; "Killing two birds with one stone", 2022, arXiv 2203.15565.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        sample_rate: float = 1.0,
        margin: Margin | None = None,
        class_group: Any = None,
        sparse: bool | None = None,
        learn_scale: bool = False,
        weight_device: Any = None,
        weight_file: str | Path | None = None,
        seed: int = 0,
        options: LinearLossOptions | None = None,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_classes < 1:
            raise ValueError(f"dim and num_classes must be positive, got {dim} and {num_classes}")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")
        margin = CosFace() if margin is None else margin
        if not isinstance(margin, Margin):
            raise TypeError(
                f"margin must be CosFace, ArcFace or CombinedMargin, got {type(margin).__name__}"
            )
        self.dim, self.num_classes, self.sample_rate = dim, num_classes, float(sample_rate)
        self.margin, self.seed, self.options, self.backend = margin, seed, options, backend
        self.sparse = sample_rate < 1 if sparse is None else sparse
        self.shards = shards_of(num_classes, class_group)
        self.step = 0
        where = device if weight_device is None else weight_device
        shape = (self.shards.count, dim)
        if weight_file is None:
            weight = torch.empty(shape, device=where, dtype=dtype)
            fresh = True
        else:
            path = of_rank(Path(weight_file), class_group)
            fresh = not path.exists()
            weight = mapped(path, shape, dtype or torch.get_default_dtype())
        self.weight = nn.Parameter(weight)
        if self.shards.group is not None:
            mark_spread(self.weight, self.shards.group)
        self.log_scale: nn.Parameter | None = None
        if learn_scale:
            self.log_scale = nn.Parameter(torch.tensor(math.log(margin.scale), device=device))
        if fresh:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Centres from N(0, 0.01²)."""
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of the batch, of all ranks.

        Args:
            features: (N, D) floating point, any N.
            labels: class ids (N,), int64; -100 for rows that do not count.
        """
        x, ids = self._batch(features, labels)
        step = self.step
        if self.training:
            self.step += 1
        local = torch.where((ids >= self.shards.first) & (ids < self.shards.end),
                            ids - self.shards.first, -1)  # fmt: skip
        if self.sample_rate < 1:
            sample = self._sampled(local, step)
            local = positions(sample, local)
        else:
            sample = None
        rows = select_normalized_rows(self.weight, sample, sparse=self.sparse, device=x.device)
        scale: float | Tensor = self.margin.scale
        if self.log_scale is not None:
            scale = self.log_scale.exp()
        of_logits = scale  # each rank has the gradient of its own logits' scale
        if isinstance(scale, Tensor) and self.shards.group is not None:
            of_logits = apply(SummedGradient, scale, self.shards.group)
        head = head_inputs(x, rows, None, of_logits, None)
        names = canonical([self._sum_name(scale), "target"])
        parameters = [scale] if isinstance(scale, Tensor) else []

        def losses(values: Any, which: slice | Tensor, given: Any) -> Tensor:
            named = dict(zip(outputs(names), values, strict=True))
            stats = RowStatistics(named, head.w.shape[0])
            if self.shards.group is not None:
                stats = stats.all_reduce(self.shards.group, num_classes=self._sizes(len(ids)))
            return self._losses(stats, names[-1], ids[which, 0] >= 0, scale)

        total = swept_losses(
            head, local, names, losses, parameters=parameters, reduced=True, options=self.options,
            backend=self.backend, counted=ids, num_classes=max(self._sizes(len(ids))),
        )  # fmt: skip
        _, divisor = row_factors(ids, None, None, head.x)
        loss: Tensor = total / divisor
        return loss

    @torch.no_grad()
    def topk(self, features: Tensor, k: int) -> TopK:
        """The ``k`` classes of the largest cosines, (N, k), over all ranks, for the same features.

        Cosines are float32 (float64 for float64 inputs), whatever the dtype of the centres is and
        autocast says. A block of centres is visited at a time: V D multiply-adds per row.
        """
        self._check_features(features)
        acc = accumulate_dtype(torch.promote_types(features.dtype, self.weight.dtype))
        x = F.normalize(features.to(acc), dim=1)
        k, best = at_most(k, self.num_classes), no_candidates(x)
        for first in range(0, self.shards.count, BLOCK):
            ids = torch.arange(first, min(first + BLOCK, self.shards.count))
            rows = select_rows(self.weight, ids, sparse=True, device=x.device).to(acc)
            names = (ids + self.shards.first).to(x.device).expand(len(x), -1)
            with without_autocast(x.device):
                cosines = x @ F.normalize(rows, dim=1).T
            best = best_of(k, (best.values, cosines), (best.indices, names))
        return best if self.shards.group is None else best_of_ranks(best, k, self.shards.group)

    def get_extra_state(self) -> dict[str, int]:
        """The step of the next sample, and which classes these are."""
        return {"step": self.step, "first": self.shards.first, "num_classes": self.num_classes}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """What `get_extra_state` returned, of a head of the same classes."""
        if state["num_classes"] != self.num_classes:
            raise ValueError(
                f"the state is of {state['num_classes']} classes, this head has {self.num_classes}"
            )
        if state["first"] != self.shards.first:
            raise ValueError(
                f"the state is of classes from {state['first']} on, this rank's begin at "
                f"{self.shards.first}; load that of the same rank, or use ShardedState"
            )
        self.step = state["step"]

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"dim={self.dim}, num_classes={self.num_classes}, sample_rate={self.sample_rate}, "
            f"margin={self.margin}, sparse={self.sparse}"
        )

    def _sum_name(self, scale: float | Tensor) -> str:
        """The log-sum over the other classes. A filter is in logits: a learned scale is read."""
        above = self.margin.filter_above
        if above is None:
            return "lse"
        factor = scale.item() if isinstance(scale, Tensor) else scale
        return f"lse<{above * factor:.9g}"

    def _losses(
        self, stats: RowStatistics, name: str, active: Tensor, scale: float | Tensor
    ) -> Tensor:
        """Losses (R,) from the statistics over all shards."""
        shift, lse = (torch.where(active, t, 0.0) for t in (stats.shift, stats.relative(name)))
        z = torch.where(active, stats.target[:, 0], 0.0)
        moved = scale * self.margin(z / scale) - shift
        return torch.where(active, -F.logsigmoid(moved - lse), 0.0)

    def _sizes(self, rows: int) -> list[int]:
        """Classes of each rank in S for a batch of so many rows."""
        if self.sample_rate == 1:
            return self.shards.counts
        return [
            min(count, max(1, rows, int(self.sample_rate * count))) for count in self.shards.counts
        ]

    def _sampled(self, local: Tensor, step: int) -> Tensor:
        """Classes of this rank in S, rising: the targets (N, 1) among them and others drawn."""
        key = stream_key(self.seed, step, self.shards.first)
        size = self._sizes(len(local))[self.shards.rank]
        return sample_keeping(local[:, 0], self.shards.count, size, key)

    def _check_features(self, features: Tensor) -> None:
        check_float("features", features)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(
                f"features must have shape (N, {self.dim}), got {tuple(features.shape)}"
            )

    def _batch(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised features (N, D) and labels (N, 1), of all ranks; -1 where not counted."""
        error: Exception | None = None
        x, ids = features, labels
        try:
            self._check_features(features)
            check_devices(features, labels=labels)
            ids = class_ids(labels, features.shape[:1], self.num_classes, None)
            if ids.device.type == "cpu" and bool((ids >= self.num_classes).any()):
                raise IndexError(
                    f"labels must be in [0, {self.num_classes}), or -100 for rows that do not "
                    f"count, got {int(labels.min())} to {int(labels.max())}"
                )
            # A NaN in a row that does not count must not reach a gradient.
            x = torch.where(ids >= 0, features, 0.0)
            acc = torch.promote_types(features.dtype, torch.float32)
            with without_autocast(features.device):
                x = F.normalize(x.to(acc), dim=1).to(features.dtype)
        except (TypeError, ValueError, IndexError) as refused:
            error = refused
        if self.shards.group is None:
            if error is not None:
                raise error
            return x, ids
        wants = torch.is_grad_enabled() and error is None and x.requires_grad
        numbers = [0 if error is not None else len(x), wants]
        device = features.device if isinstance(features, Tensor) else self.weight.device
        found = from_all(numbers, error, self.shards.group, device)
        counts = [line[0] for line in found]
        x = wanting(x, any(line[1] for line in found))
        x = apply(ScaledGradient, x, len(counts))
        x = apply(GatherRows, x, counts, self.shards.group)
        return x, gather_rows(ids, counts, self.shards.group)
