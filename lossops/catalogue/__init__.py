"""Published losses over very many classes, each a small function of row statistics.

``RECIPES`` is the table of them all: ``catalogue.linear_focal_loss`` is defined in one file here,
as F with its formula, and listed with its signature in ``__init__.pyi``. docs/catalogue.md says when
to use which.
"""

from typing import Any

from lossops.catalogue import (
    confidence,
    contrastive,
    distillation,
    elementwise,
    heads,
    robust,
    selection,
    tokens,
)
from lossops.catalogue.distillation import dino_center
from lossops.catalogue.heads import adaptive_lambda
from lossops.catalogue.recipe import RECIPES, CatalogueModule, Recipe
from lossops.catalogue.selection import previous_tokens, ramp, running_log_partition
from lossops.catalogue.tokens import min_k_scores

_FACES: dict[str, Any] = {recipe.face.__name__: recipe.face for recipe in RECIPES.values()}
_MODULES: dict[str, Any] = {
    recipe.module.__name__: recipe.module for recipe in RECIPES.values() if recipe.module
}
HELPERS = (
    "adaptive_lambda",
    "dino_center",
    "min_k_scores",
    "previous_tokens",
    "ramp",
    "running_log_partition",
)
globals().update(_FACES | _MODULES)

__all__ = ["RECIPES", "Recipe", *HELPERS, *_FACES, *_MODULES]  # noqa: PLE0604
