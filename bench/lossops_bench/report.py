"""Tables for people: of a run's rows, and of what can be run."""

from collections.abc import Sequence
from itertools import groupby

from rich.table import Table
from rich.text import Text

from lossops_bench.figures import Row

__all__ = ["bytes_text", "caption", "problem_title", "results_table", "seconds_text"]


def problem_title(row: Row) -> str:
    name = f"{row['shape_name']} " if row["shape_name"] else ""
    n, d, v = row["shape"]
    return f"{row['case']} {row['mode']} · {name}N={n} D={d} V={v} · {row['dtype']}"


def results_table(rows: Sequence[Row]) -> Table:
    """The rows of one problem; rivals that were skipped are not among the lines."""
    table = Table(title=problem_title(rows[0]), title_style="bold", title_justify="left")
    errors = list(dict.fromkeys(name for row in rows for name in row["errors"]))
    table.add_column("rival", no_wrap=True)
    unit = rows[0]["unit"].partition(":")[0]
    for name in ("time", "±", "rows/s", "GB/s", "TFLOP/s", f"{unit}s", "extra"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in errors:
        table.add_column(f"error {name}", justify="right")
    notes = any(row["note"] for row in rows)
    if notes:
        table.add_column("ran")
    for row in rows:
        if row["status"] != "skipped":
            cells = [*_speed(row), *(_error(row["errors"].get(name)) for name in errors)]
            table.add_row(*cells, *([row["note"]] if notes else []), style=_style(row))
    return table


def caption(rows: Sequence[Row]) -> Text:
    """What the table does not say: who is missing and why, and on what the errors rest."""
    first, lines = rows[0], []
    for status, group in groupby(sorted(rows, key=lambda r: r["status"]), lambda r: r["status"]):
        if status in ("wrong", "skipped"):
            lines += [f"{status}: {row['rival']}: {row['reason']}" for row in group]
    n, machine = first["shape"][0], first["machine"]
    part = "" if first["truth_rows"] == n else f", on the first {first['truth_rows']} of {n} rows"
    lines += [
        f"1 {first['unit']}. Errors are relative to float64{part}.",
        f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads, "
        f"torch {first['versions']['torch']}, lossops {first['versions']['lossops']}",
    ]
    return Text("\n".join(lines), style="dim")


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def bytes_text(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _speed(row: Row) -> list[str]:
    extra = "" if row["extra_bytes"] is None else bytes_text(row["extra_bytes"])
    if row["status"] == "wrong":
        return [row["rival"], "wrong", "", "", "", "", "", extra]
    return [
        row["rival"],
        seconds_text(row["seconds"]),
        f"{row['spread']:.0%}",
        f"{row['rows_per_second']:,.0f}",
        f"{row['gigabytes_per_second']:.1f}",
        f"{row['teraflops']:.3f}",
        f"{row['units']:.2f}",
        extra,
    ]


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def _style(row: Row) -> str:
    if row["status"] == "ok":
        return "bold green" if row["rival"].startswith("lossops") else ""
    return {"wrong": "red", "unit": "dim"}[row["status"]]
