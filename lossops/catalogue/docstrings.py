"""Docstrings of faces and modules: a recipe's own words, and those all of them share."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from lossops.catalogue.keywords import FACE, NOTE, POSITIONAL, RAISES, Keywords

SECTIONS = ("Args", "Returns", "Raises", "Note", "Example", "Reference")
WIDTH = 96


def sections(text: str) -> dict[str, str]:
    """Texts of a docstring by section, what stands before them under ''."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):$", inspect.cleandoc(text), flags=re.MULTILINE)
    bodies = (inspect.cleandoc("\n" + body) for body in parts[2::2])
    return {"": parts[0].strip(), **dict(zip(parts[1::2], bodies, strict=True))}


def entries(text: str) -> dict[str, str]:
    """ "name: words" entries by name, as they are written."""
    found = re.findall(r"^(\w+): (.*(?:\n {4}.*)*)", text, flags=re.MULTILINE)
    return {name: " ".join(line.strip() for line in words.splitlines()) for name, words in found}


def face_docstring(
    name: str,
    doc: str,
    positional: tuple[str, ...],
    own: Mapping[str, inspect.Parameter],
    head: Keywords,
    memory: str,
    example: Mapping[str, Any],
) -> str:
    """The docstring of a face, in the order of all docstrings here."""
    given = sections(doc)
    words = POSITIONAL | entries(given.get("Args", ""))
    if missing := [n for n in (*positional, *own) if n not in words]:
        raise ValueError(f"{name}: Args must describe {', '.join(missing)}")
    lines = [_entry(n, words[n]) for n in (*positional, *own)]
    lines += [_entry(n, f"{k.words} Default: ``{k.default!r}``.") for n, k in head.items()]
    body = {
        "Args": "\n".join(lines),
        "Returns": given.get("Returns", FACE),
        "Raises": given.get("Raises", RAISES),
        "Note": "\n".join([*([given["Note"]] if "Note" in given else []), NOTE, *_wrapped(memory)]),
        "Example": given.get("Example") or _example(name, positional, example),
        "Reference": given.get("Reference", ""),
    }
    parts = [given[""]]
    for section, text in body.items():
        if text:
            indented = "\n".join(f"    {line}" if line else "" for line in text.splitlines())
            parts.append(f"{section}:\n{indented}")
    return "\n\n".join(parts) + "\n"


def module_docstring(
    name: str, face: str, doc: str, own: Mapping[str, inspect.Parameter], bias: bool
) -> str:
    """The docstring of the module of a recipe."""
    summary = sections(doc)[""].split("\n\n")[0]
    named = "".join(f"    {n}: of `{face}`; by call where not given here.\n" for n in own)
    if bias:
        named += "    bias: whether there is a bias (V,). Default: ``False``.\n"
    return f"""{summary}

As `lossops.catalogue.{face}`, with its own weight.

Args:
    in_features: D.
    num_classes: V.
{named}    device, dtype: of the parameters.
    options: further keywords of `{face}`.

Example:
    >>> import lossops
    >>> lossops.catalogue.{name}(8, 100).linear_weight.shape
    torch.Size([100, 8])
"""


def _example(name: str, positional: tuple[str, ...], example: Mapping[str, Any]) -> str:
    """A call that runs in a moment, for recipes that give none."""
    if positional != ("input", "linear_weight", "target"):
        raise ValueError(f"{name}: the docstring needs an Example of its own")
    own = "".join(f", {n}={value!r}" for n, value in example.items())
    return (
        ">>> import torch, lossops\n"
        ">>> x, w = torch.randn(4, 8, requires_grad=True), torch.randn(100, 8)\n"
        ">>> y = torch.tensor([3, 1, 4, -100])\n"
        f">>> lossops.catalogue.{name}(x, w, y{own}).backward()\n"
        ">>> x.grad.shape\n"
        "torch.Size([4, 8])"
    )


def _wrapped(memory: str) -> list[str]:
    """What is held beyond inputs and gradients, and the products, as lines."""
    return textwrap.wrap(f"Memory beyond inputs and gradients, and cost: {memory}.", WIDTH - 4)


def _entry(name: str, words: str) -> str:
    """ "name: words", broken at the width, later lines indented."""
    lines, line = [], f"{name}:"
    for word in words.split(" "):
        if len(line) + 1 + len(word) > WIDTH - 4:
            lines.append(line)
            line = "    " + word
        else:
            line = f"{line} {word}"
    return "\n".join([*lines, line])
