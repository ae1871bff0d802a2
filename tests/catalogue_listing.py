"""What follows from the table of recipes: the stub with all signatures, and docs/catalogue.md."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from lossops.catalogue.docstrings import sections
from lossops.catalogue.recipe import RECIPES, Recipe

WIDTH = 100
PREFIXES = re.compile(r"\b(?:torch|typing|collections\.abc|lossops\.schedules)\.(?=[A-Z])")
HEADER = '''\
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
'''


def stub() -> str:
    """The text of ``lossops/catalogue/__init__.pyi``."""
    parts = [HEADER]
    for recipe in RECIPES.values():
        parts.append(_definition(f"def {recipe.face.__name__}(", recipe.face, 0) + "\n")
        if recipe.module is not None:
            parts.append(
                f"class {recipe.module.__name__}(CatalogueModule):\n"
                + _definition("def __init__(self, ", recipe.module, 4) + "\n"
            )  # fmt: skip
    return "\n".join(parts)


def tables() -> str:
    """The tables of docs/catalogue.md, a section for each family."""
    families: dict[str, list[Recipe]] = {}
    for recipe in RECIPES.values():
        families.setdefault(recipe.family, []).append(recipe)
    return "\n\n".join(
        "\n".join([f"### {family}", "", *_rows(recipes)]) for family, recipes in families.items()
    )


def _rows(recipes: list[Recipe]) -> Iterator[str]:
    yield "| loss | formula | when to use it | statistics | memory and cost | reference |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for r in recipes:
        found = sections(r.face.__doc__ or "")
        names = r.statistics
        listed = names if isinstance(names, str) else ", ".join(f"`{n}`" for n in names)
        cells = (
            f"`{r.face.__name__}`",
            f"`{_one_line(found[''].split(chr(10) * 2)[1])}`",
            r.use,
            listed,
            r.memory,
            _one_line(found.get("Reference", "")),
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _definition(start: str, thing: Callable[..., Any], indent: int) -> str:
    """A signature on as few lines as hold it."""
    signature = inspect.signature(thing)
    words = [_argument(p) for p in signature.parameters.values()]
    kinds = [p.kind for p in signature.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        words.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returns = "None" if isinstance(thing, type) else _annotation(signature.return_annotation)
    lines = [" " * indent + start.rstrip()]
    line = " " * (indent + 4)
    for word in words:
        if len(line) + len(word) + 2 > WIDTH:
            lines.append(line.rstrip())
            line = " " * (indent + 4)
        line += f"{word}, "
    return "\n".join([*lines, line.rstrip(), " " * indent + f") -> {returns}: ..."])


def _argument(p: inspect.Parameter) -> str:
    name = f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name
    default = "" if p.default is p.empty else f" = {p.default!r}"
    written = _annotation(p.annotation)
    if p.default is None and written != "Any" and "None" not in written:
        written += " | None"  # of a module, which takes it by call, too
    return f"{name}: {written}{default}"


def _annotation(annotation: Any) -> str:
    return PREFIXES.sub("", inspect.formatannotation(annotation)).replace("NoneType", "None")
