"""The benchmark of lossops: rivals side by side, in GEMM-equivalents, extra memory and error.

`lossops-bench` and `python -m lossops_bench` both start at `main`.
"""

import importlib.util
import sys

EXTRA = ("typer", "rich", "matplotlib", "psutil")
INSTALL = "pip install '.[bench]' in a clone of lossops"


def main() -> None:
    """Run the command line, or say how to install what it needs and exit with status 2."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        print(f"lossops-bench needs {', '.join(missing)}; install with: {INSTALL}", file=sys.stderr)
        raise SystemExit(2)
    from lossops_bench.cli import build_app

    build_app()()
