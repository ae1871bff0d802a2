"""What a recipe is, and how its face and its module come about.

    face      linear_<name>_loss(input, linear_weight, target, *, own arguments, head keywords)
    module    Linear<Name>Loss(in_features, num_classes, *, own arguments, bias=False, ...)

`recipe` decorates F, a function of `RowStatistics` and its own arguments that returns one loss per
row; `lossops.linear_loss` does the rest. `composed` decorates a function that calls what exists: it
gets the first arguments of the face, the head keywords as one dict, and its own arguments. Either
becomes the face, under the name it was defined with; F stays in ``RECIPES[name].function``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from torch import Tensor, nn

from lossops.catalogue.docstrings import face_docstring, module_docstring
from lossops.catalogue.keywords import HEAD, Keywords
from lossops.inputs import check_constant, is_ignored
from lossops.linear import linear_loss
from lossops.modules import _LinearHead
from lossops.statistics import RowStatistics

TARGETED = ("input", "linear_weight", "target")
ONE_SWEEP = "a chunk of logits, 3 GEMMs"
TWO_SWEEPS = "a tile of logits, 4 GEMMs"


@dataclass(frozen=True)
class Recipe:
    """One loss of the catalogue.

    Attributes:
        name: what stands between ``linear_`` and ``_loss`` in the names of its face.
        family: the section of docs/catalogue.md.
        use: when to use it, a phrase.
        statistics: names of the statistics it asks for, or words.
        memory: beyond inputs and gradients, and the cost, in words.
        function: what was decorated.
        face: the function users call.
        module: its `torch.nn.Module`; None where it has none.
        positional: the first arguments of the face.
        own: parameters of the face that are this recipe's, by name.
        head: the shared keywords it takes.
        rows: own arguments that hold a value per row.
        example: own arguments without default, for examples.

    Example:
        >>> import lossops
        >>> focal = lossops.catalogue.RECIPES["focal"]
        >>> focal.face.__name__, focal.statistics, focal.own["gamma"].default
        ('linear_focal_loss', ('lse', 'target'), 2.0)
    """

    name: str
    family: str
    use: str
    statistics: tuple[str, ...] | str
    memory: str
    function: Callable[..., Any]
    face: Callable[..., Any]
    module: type[nn.Module] | None
    positional: tuple[str, ...]
    own: Mapping[str, inspect.Parameter]
    head: Keywords
    rows: tuple[str, ...]
    example: Mapping[str, Any]


RECIPES: dict[str, Recipe] = {}
"""Every loss of the catalogue by name."""

Names = tuple[str, ...] | Callable[..., tuple[str, ...]]


def recipe(
    *,
    family: str,
    use: str,
    names: Names = ("lse", "target"),
    rows: tuple[str, ...] = (),
    rowwise: bool = True,
    example: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make F(stats, *, own arguments) -> (R,) a loss of the catalogue.

    Args:
        family: the section of docs/catalogue.md.
        use: when to use it, a phrase.
        names: statistics F asks for, or a function of the own arguments that gives them.
            Default: ``('lse', 'target')``.
        rows: own arguments (...) that are handed to F by rows; one called ``counted``, which rows
            are not ignored, is filled in. Default: ``()``.
        rowwise: whether F treats rows independently. Default: ``True``.
        example: own arguments without default, for examples. Default: ``None``.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(
            input: Any, linear_weight: Any, target: Any, head: dict[str, Any], **own: Any
        ) -> Tensor:
            if "counted" in rows:
                own["counted"] = ~is_ignored(target, head["ignore_index"])
            by_row = {n: own.pop(n) for n in rows if own[n] is not None}
            asked = names(**own) if callable(names) else names
            learned = [t for t in own.values() if isinstance(t, Tensor) and t.requires_grad]

            def loss_fn(stats: RowStatistics, **given: Tensor) -> Tensor:
                return function(stats, **own, **given)

            return linear_loss(
                input,
                linear_weight,
                target,
                loss_fn,
                names=asked,
                row_inputs=by_row,
                parameters=learned,
                rowwise=rowwise,
                **head,
            )

        statistics = (
            names if isinstance(names, tuple) else names(**_with_defaults(function, example))
        )
        memory = ONE_SWEEP if rowwise else TWO_SWEEPS
        return _enter(function, call, 1, family, use, statistics, memory, HEAD, rows, example or {})

    return decorate


def composed(
    *,
    family: str,
    use: str,
    statistics: tuple[str, ...] | str,
    memory: str,
    head: Keywords = HEAD,
    example: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make f(first arguments, head keywords, *, own arguments) a loss of the catalogue.

    Args:
        family: the section of docs/catalogue.md.
        use: when to use it, a phrase.
        statistics: what it asks the engine for.
        memory: beyond inputs and gradients, and the cost, in words.
        head: the shared keywords it takes. Default: those of `lossops.linear_loss`.
        example: own arguments without default, for examples. Default: ``None``.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        first = len(_positional(function))
        return _enter(
            function, function, first, family, use, statistics, memory, head, (), example or {}
        )

    return decorate


def _enter(
    function: Callable[..., Any],
    call: Callable[..., Any],
    skipped: int,
    family: str,
    use: str,
    statistics: tuple[str, ...] | str,
    memory: str,
    head: Keywords,
    rows: tuple[str, ...],
    example: Mapping[str, Any],
) -> Callable[..., Any]:
    """Build face and module, and note the recipe."""
    name = function.__name__
    hints = get_type_hints(function)
    positional = TARGETED if call is not function else _positional(function)[:-1]
    parameters = list(inspect.signature(function).parameters.values())[skipped:]
    own = {
        p.name: p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY)
        for p in parameters
        if p.name != "counted"
    }
    defaults = {n: p.default for n, p in own.items() if p.default is not p.empty}
    defaults |= {n: k.default for n, k in head.items()}
    known = [*own, *head]
    numbers = _numbers(own)

    def face(*first: Any, **keywords: Any) -> Any:
        if len(first) < len(positional):  # by name, as PyTorch's functions can be called
            first += tuple(_taken(name, keywords, n) for n in positional[len(first) :])
        if len(first) > len(positional):
            raise TypeError(f"{name}() takes {len(positional)} positional arguments, "
                            f"got {len(first)}; the others are keywords")  # fmt: skip
        given = {**defaults, **keywords}
        for n in given:
            if n not in known:
                raise TypeError(f"{name}() has no keyword {n!r}; it has {', '.join(known)}")
        settled = {n: _taken(name, given, n) for n in own}
        for n, learned in numbers.items():
            _check_number(n, settled[n], learned)
        return call(*first, given, **settled)

    empty = inspect.Parameter.empty
    annotations = {n: hints.get(n, Tensor) for n in positional}
    plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [
            *(inspect.Parameter(n, plain, annotation=annotations[n]) for n in positional),
            *(p for p in own.values() if p.default is empty),
            *(p for p in own.values() if p.default is not empty),
            *(
                inspect.Parameter(
                    n, inspect.Parameter.KEYWORD_ONLY, default=k.default, annotation=k.annotation
                )
                for n, k in head.items()
            ),
        ],
        return_annotation=hints["return"],
    )
    face.__name__ = face.__qualname__ = name
    face.__module__ = "lossops.catalogue"
    face.__signature__ = signature  # type: ignore[attr-defined]
    face.__annotations__ = {n: p.annotation for n, p in signature.parameters.items()}
    face.__annotations__["return"] = signature.return_annotation
    doc = function.__doc__ or ""
    face.__doc__ = face_docstring(name, doc, positional, own, head, memory, example)
    module = _module(face, name, doc, own, head, positional)
    short = name.removeprefix("linear_").removesuffix("_loss")
    RECIPES[short] = Recipe(
        short, family, use, statistics, memory, function, face, module, positional, own, head,
        rows, example,
    )  # fmt: skip
    return face


class CatalogueModule(_LinearHead):
    """A linear head with one loss of the catalogue; parameters among its arguments are its own."""

    face: Callable[..., Any]

    def forward(self, input: Tensor, *target: Tensor, **options: Any) -> Any:
        """The loss of ``input`` (..., D); further arguments and keywords as of the function."""
        bias = {} if self.linear_bias is None else {"linear_bias": self.linear_bias}
        own = {**self.keywords, **options}
        return type(self).face(input, self.linear_weight, *target, **bias, **own)


def _module(
    face: Callable[..., Any],
    name: str,
    doc: str,
    own: Mapping[str, inspect.Parameter],
    head: Keywords,
    positional: tuple[str, ...],
) -> type[nn.Module] | None:
    """The module of a face that begins with input and weight."""
    if positional[:2] != TARGETED[:2]:
        return None
    camel = "".join(word.capitalize() for word in name.split("_"))
    kind = inspect.Parameter.KEYWORD_ONLY
    sizes = [
        inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=int)
        for n in ("in_features", "num_classes")
    ]
    by_call = [p.replace(default=None) if p.default is p.empty else p for p in own.values()]
    bias = [inspect.Parameter("bias", kind, default=False, annotation=bool)]
    others = [
        inspect.Parameter("device", kind, default=None, annotation=Any),
        inspect.Parameter("dtype", kind, default=None, annotation=Any),
        inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD, annotation=Any),
    ]
    members = {
        "face": staticmethod(face),
        "__doc__": module_docstring(camel, name, doc, own, "linear_bias" in head),
        "__module__": "lossops.catalogue",
        "__signature__": inspect.Signature(
            [*sizes, *by_call, *(bias if "linear_bias" in head else []), *others]
        ),
    }
    return type(camel, (CatalogueModule,), members)


def _positional(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD)


def _with_defaults(
    function: Callable[..., Any], example: Mapping[str, Any] | None
) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    return given | dict(example or {})


def _taken(name: str, keywords: dict[str, Any], argument: str) -> Any:
    if argument not in keywords:
        raise TypeError(f"{name}() needs {argument}, got none; pass {argument}=")
    return keywords.pop(argument)


def _numbers(own: Mapping[str, inspect.Parameter]) -> dict[str, bool]:
    """Which parameters are a number, and whether that may be a tensor that learns."""
    kinds = {n: {p.annotation, *get_args(p.annotation)} for n, p in own.items()}
    return {n: Tensor in kind for n, kind in kinds.items() if float in kind}


def _check_number(argument: str, value: Any, learned: bool) -> None:
    """Refuse tensors for a number: of several, or where a gradient would be lost."""
    if not isinstance(value, Tensor):
        return
    if not learned:
        check_constant(argument, value)
    if value.numel() != 1:
        raise ValueError(
            f"{argument} must be one number for all rows, got shape {tuple(value.shape)}"
        )
