"""Published losses over very many classes, each a small function of row statistics.

``RECIPES`` is the table of them all: ``linear_focal_loss``, say, is defined in one file here, as F
with its formula, and listed with its signature in ``__init__.pyi``. docs/catalogue.md says when to
use which.
"""

from typing import Any

from lossops.catalogue import confidence as confidence
from lossops.catalogue import contrastive as contrastive
from lossops.catalogue import cosines as cosines
from lossops.catalogue import elementwise as elementwise
from lossops.catalogue import probabilities as probabilities
from lossops.catalogue import retrieval as retrieval
from lossops.catalogue import robust as robust
from lossops.catalogue.distillation import dino_center as dino_center
from lossops.catalogue.heads import adaptive_lambda as adaptive_lambda
from lossops.catalogue.recipe import RECIPES, Recipe
from lossops.catalogue.recipe import CatalogueModule as CatalogueModule
from lossops.catalogue.selection import previous_tokens as previous_tokens
from lossops.catalogue.selection import ramp as ramp
from lossops.catalogue.selection import running_log_partition as running_log_partition
from lossops.catalogue.tokens import min_k_scores as min_k_scores

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

__all__ = ["RECIPES", "Recipe", *HELPERS, *_FACES, *_MODULES]
