"""The losses of the catalogue on stored logits: what tests compare with and benchmarks race.

`dense` puts a function of logits z (N, V) and target ids y (N,), written from the paper's formula
in plain PyTorch, beside the recipe of its name. It uses nothing of lossops.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["DENSE", "Dense", "Draw", "dense", "of_target"]

Losses = Callable[..., Tensor]


@dataclass(frozen=True)
class Draw:
    """Seeded tensors for arguments that are no numbers."""

    lead: tuple[int, ...]
    """The leading dims of the features."""
    classes: int
    features: int
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def ids(self, most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=self.generator)


Extras = Callable[[Draw], dict[str, Any]]


@dataclass(frozen=True)
class Dense:
    """One loss in plain PyTorch."""

    losses: Losses
    """Losses (N,) of logits and ids; of features, weight and ids where ``of_features``; of the
    ``leaves`` alone where there are any."""
    variants: tuple[Mapping[str, Any], ...]
    """Own arguments of the recipe to test with; the benchmark takes the first."""
    extras: Extras | None
    """Further arguments that are tensors."""
    lead: tuple[int, ...]
    """Leading dims of the features in tests; a sequence loss needs two."""
    leaves: Callable[[Draw], tuple[Tensor, ...]] | None
    """What is differentiated, where that is not features and a weight."""
    of_features: bool
    whole: bool
    """Whether ``losses`` gives the reduced loss itself."""
    weighted: bool
    """Whether its mean with weights is that of the rows' losses."""
    least_classes: int
    """Fewest classes its arguments make sense with."""
    by_feature: bool
    """Whether the definition takes N·V·D values, not N·V."""


DENSE: dict[str, Dense] = {}
"""By the name of the recipe."""


def dense(
    *variants: Mapping[str, Any],
    extras: Extras | None = None,
    lead: tuple[int, ...] = (11,),
    leaves: Callable[[Draw], tuple[Tensor, ...]] | None = None,
    of_features: bool = False,
    whole: bool = False,
    weighted: bool = True,
    least_classes: int = 1,
    by_feature: bool = False,
) -> Callable[[Losses], Losses]:
    """Enter a function under its own name."""

    def enter(losses: Losses) -> Losses:
        DENSE[losses.__name__] = Dense(
            losses,
            variants or ({},),
            extras,
            lead,
            leaves,
            of_features or leaves is not None,
            whole,
            weighted,
            least_classes,
            by_feature,
        )
        return losses

    return enter


def of_target(values: Tensor, y: Tensor) -> Tensor:
    """(N, V) at the ids (N,)."""
    return values.gather(-1, y.unsqueeze(-1)).squeeze(-1)
