"""Shapes (N, D, V): rows, features and classes, of real heads by name."""

from dataclasses import dataclass, replace

__all__ = ["SHAPES", "Shape", "parse_shape"]


@dataclass(frozen=True)
class Shape:
    """N rows (tokens) of D features against V classes."""

    rows: int
    features: int
    classes: int
    name: str = ""

    def __str__(self) -> str:
        numbers = f"{self.rows}, {self.features}, {self.classes}"
        return f"{self.name} ({numbers})" if self.name else f"({numbers})"


_NAMED = (
    Shape(1024, 1024, 32768, "small"),
    Shape(2048, 1024, 65536, "medium"),
    Shape(8192, 1024, 65536, "large"),
    Shape(8192, 768, 50257, "gpt2"),
    Shape(8192, 2048, 151936, "qwen"),
    Shape(8192, 4096, 128256, "llama3-8b"),
    Shape(8192, 2304, 256000, "gemma2-2b"),
    Shape(8192, 768, 8192, "siglip-8k"),
    Shape(262144, 64, 262144, "siglip-256k"),
    Shape(1048576, 64, 1048576, "siglip-1m"),
)
SHAPES = {shape.name: shape for shape in _NAMED}


def parse_shape(text: str) -> Shape:
    """Read ``N,D,V``, a name, or a name with its own number of rows as in ``gemma2-2b:2048``."""
    name, _, rows = text.strip().partition(":")
    try:
        if name in SHAPES:
            shape = SHAPES[name]
            shape = replace(shape, rows=int(rows)) if rows else shape
        else:
            n, d, v = (int(part) for part in text.split(","))
            shape = Shape(n, d, v)
    except ValueError:
        raise ValueError(
            f"--shape must be N,D,V, one of {', '.join(SHAPES)}, or NAME:N; got {text!r}"
        ) from None
    if min(shape.rows, shape.features, shape.classes) < 1:
        raise ValueError(f"--shape needs positive N, D and V, got {text!r}")
    return shape
