"""Tables for people: of a run's rows, and of what can be run."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from lossops_bench.case import Case, Problem
from lossops_bench.figures import Row
from lossops_bench.shapes import Shape

__all__ = [
    "bytes_text",
    "case_table",
    "catalogue_table",
    "footnotes",
    "plain_table",
    "problem_title",
    "results_table",
    "shapes_table",
]


def results_table(rows: Sequence[Row]) -> Table:
    """The rows of one problem; rivals that did not run are left to the footnotes."""
    errors = list(dict.fromkeys(name for row in rows for name in row["errors"]))
    unit = rows[0]["unit"].partition(":")[0]
    speed = ("time", "±", "rows/s", "GB/s", "TFLOP/s", f"× {unit}", "extra")
    notes = any(row["note"] for row in rows)
    table = plain_table(problem_title(rows[0]))
    table.add_column("rival", no_wrap=True)
    for heading in (*speed, *(f"{name} err" for name in errors)):
        table.add_column(heading, justify="right", no_wrap=True)
    if notes:
        table.add_column("ran", no_wrap=True)
    for row in rows:
        if row["status"] in _STYLES:
            cells = [*_speed(row), *(_error(row["errors"].get(name)) for name in errors)]
            table.add_row(*cells, *([row["note"]] if notes else []), style=_style(row))
    return table


def catalogue_table(cases: Sequence[Sequence[Row]]) -> Table:
    """A line for each loss: ours beside plain PyTorch, and over our plain cross-entropy."""
    first = cases[0][0]
    n, d, v = first["shape"]
    table = plain_table(f"catalogue, {first['mode']}, N={n} D={d} V={v}, {first['dtype']}")
    table.add_column("loss", no_wrap=True)
    for heading in ("time", "±", "× CE", "extra", "plain", "× CE", "extra", "worst err", "plain's"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rows in cases:
        by_name = {row["rival"]: row for row in rows}
        cells = []
        for name in ("lossops", "plain"):
            row = by_name.get(name)
            if row is None or row["seconds"] is None:
                cells.append([row["status"] if row else "", "", "", "", ""])
                continue
            speed = _speed(row)
            extra = "" if row["extra_bytes"] is None else speed[7]
            worst = max(row["errors"].values(), default=None)
            cells.append([speed[1], speed[2], speed[6], extra, _error(worst)])
        ours, plain = cells
        table.add_row(
            rows[0]["case"].partition("/")[2], *ours[:4], plain[0], *plain[2:4], ours[4], plain[4]
        )
    return table


def footnotes(rows: Sequence[Row]) -> Text:
    """What the table does not say: who is missing and why, and what the figures rest on."""
    lines = [
        f"{row['rival']}: {row['status']}: {row['reason']}"
        for status in ("wrong", "skipped", "absent")
        for row in rows
        if row["status"] == status
    ]
    first, machine, versions = rows[0], rows[0]["machine"], rows[0]["versions"]
    checked, n = first["truth_rows"], first["shape"][0]
    if checked:
        part = f", on the first {checked} of {n} rows" if checked < n else ""
        lines.append(f"The unit is {first['unit']}. Errors are against float64{part}.")
    lines.append(
        f"{machine['cpu']} ({machine['cpu_capability']}), {machine['threads']} threads, "
        f"torch {versions['torch']}, lossops {versions['lossops']}, Python {versions['python']}"
    )
    return Text("\n".join(lines), style="dim")


def problem_title(row: Row) -> str:
    name = f"{row['shape_name']} " if row["shape_name"] else ""
    n, d, v = row["shape"]
    return f"{row['case']}, {row['mode']}, {name}N={n} D={d} V={v}, {row['dtype']}"


def case_table(case: Case, problem: Problem) -> Table:
    """A case's rivals, with what each has against running a problem."""
    table = plain_table(f"{case.name}: {case.summary}")
    for heading in ("rival", "what it is", "why it cannot run here"):
        table.add_column(heading)
    for rival in case.rivals:
        objection = rival.objection(problem) or ""
        table.add_row(rival.name, rival.summary, objection, style="dim" if objection else "")
    return table


def shapes_table(shapes: Iterable[Shape]) -> Table:
    table = plain_table("Shapes by name; NAME:N takes another N")
    table.add_column("name")
    for heading in ("N", "D", "V"):
        table.add_column(heading, justify="right")
    for shape in shapes:
        table.add_row(shape.name, str(shape.rows), str(shape.features), str(shape.classes))
    return table


def bytes_text(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


_STYLES = {"ok": "", "wrong": "red", "unit": "dim"}


def _style(row: Row) -> str:
    ours = row["status"] == "ok" and row["rival"].startswith("lossops")
    return "bold green" if ours else _STYLES[row["status"]]


def plain_table(title: str) -> Table:
    look = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    return Table(title=title, title_style="bold", title_justify="left", **look)  # type: ignore[arg-type]


def _speed(row: Row) -> list[str]:
    extra = "" if row["extra_bytes"] is None else bytes_text(row["extra_bytes"])
    if row["status"] == "wrong":
        return [row["rival"], "wrong", "", "", "", "", "", extra]
    seconds = row["seconds"]
    return [
        row["rival"],
        f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms",
        f"{row['spread']:.0%}",
        f"{row['rows_per_second']:,.0f}",
        f"{row['gigabytes_per_second']:.1f}",
        f"{row['teraflops']:.3f}",
        f"{row['units']:.2f}",
        extra,
    ]


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"
