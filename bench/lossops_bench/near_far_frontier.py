"""Error against cost of near and far gradients, straight from the definition, on a trained head.

What can be chosen, each with thresholds from 2⁻⁸ to 2⁻¹⁴:

    what is near   tiles of 64 rows by 64 classes, or columns of a block of rows
    the rows       as they come, or ordered so that a block is alike
    the classes    by frequency, or shuffled
    the rest       dropped; kept as sums; kept as sums with the tilt, the first-order term of
                   e^{x·w}: dx_i += r_i C_w (x_i - x̄), dw_j += c_j C_x (w_j - w̄), with the
                   covariances C of the rows and classes within their groups, weighted by far mass

Cost counts products: 1 for the logits, 2 ρ for the near part, 2 / I + 2 / J for the sums of groups
of I by J and, of a tilt, its covariance of classes and its product with all of w, 2 D / N.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lossops.near_far import BLOCK, GROUP, alike_rows
from lossops_bench.near_far_model import TrainedHead

__all__ = ["FrontierPoint", "frontier", "write_frontier"]

LEVELS = (8, 10, 11, 12, 13, 14)
TILE = 64


@dataclass(frozen=True)
class Setting:
    """One way to choose what is near."""

    name: str
    near: str  # "tiles" or "columns"
    alike: bool
    shuffled: bool
    block: int
    group: int


SETTINGS = (
    Setting("tiles, classes by frequency", "tiles", False, False, TILE, TILE),
    Setting("tiles, classes shuffled", "tiles", False, True, TILE, TILE),
    Setting("columns, classes shuffled", "columns", False, True, TILE, 256),
    Setting("columns, alike rows, classes shuffled", "columns", True, True, BLOCK, GROUP),
)


@dataclass(frozen=True)
class FrontierPoint:
    """One setting at one threshold; errors relative to the whole gradient, targets included."""

    setting: str
    rest: str  # "dropped", "sums", "sums and tilt"
    level: int  # τ = 2^-level
    near: float  # ρ
    cost: float  # GEMM-equivalents
    error_dx: float
    error_dw: float
    class_10: float  # deciles over the classes of the error relative to a class's own row of dw
    class_50: float
    class_90: float


@torch.no_grad()
def frontier(
    head: TrainedHead, rows: int, on_step: Callable[[float, str], None] = lambda done, note: None
) -> list[FrontierPoint]:
    """All settings on the first rows of a trained head.

    Args:
        head: x, w and targets.
        rows: N; M of (N, V) is stored.
        on_step: hears the part that is done, and what begins.
    """
    points: list[FrontierPoint] = []
    for index, setting in enumerate(SETTINGS):
        on_step(index / len(SETTINGS), setting.name)
        points += _Study(head, rows, setting).points()
    on_step(1.0, "done")
    return points


class _Study:
    """M of a head in the order of a setting, and its exact gradients."""

    def __init__(self, head: TrainedHead, rows: int, setting: Setting) -> None:
        self.setting = setting
        n = rows // setting.block * setting.block
        v = len(head.w) // setting.group * setting.group  # whole groups: a study, not a kernel
        classes = torch.arange(v)
        if setting.shuffled:
            classes = torch.randperm(v, generator=torch.Generator().manual_seed(0))
        order = alike_rows(head.x[:n], setting.block) if setting.alike else torch.arange(n)
        self.x, self.w = head.x[order], head.w[classes]
        place = torch.full((len(head.w),), -1)
        place[classes] = torch.arange(v)
        y = place[head.target[order]]
        inside = y >= 0
        self.m = (self.x @ self.w.T).softmax(1)  # (N, V)
        self.m[torch.arange(n)[inside], y[inside]] = 0.0
        self.dx, self.dw = self.m @ self.w, self.m.T @ self.x
        pull = self.m.sum(1, keepdim=True)  # 1 - p of the target
        whole_x, whole_w = self.dx.clone(), self.dw.clone()
        whole_x[inside] -= pull[inside] * self.w[y[inside]]
        whole_w.index_add_(0, y[inside], -pull[inside] * self.x[inside])
        self.size_x, self.size_w = whole_x.norm(), whole_w.norm()
        self.size_class = whole_w.norm(dim=1)

    def points(self) -> list[FrontierPoint]:
        return [point for level in LEVELS for point in self.at(level)]

    def at(self, level: int) -> list[FrontierPoint]:
        """The three ways to treat the rest at one threshold."""
        s, (n, v) = self.setting, self.m.shape
        near = self.m > 2.0**-level
        if s.near == "columns":
            blocks = near.view(n // s.block, s.block, v).any(1)
            near = blocks.repeat_interleave(s.block, 0)
        else:
            tiles = near.view(n // TILE, TILE, v // TILE, TILE).any(3).any(1)
            near = tiles.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
        share = float(near.float().mean())
        kept = self.m * near
        dx, dw = kept @ self.w, kept.T @ self.x
        found = [self.point("dropped", level, share, 0.0, dx, dw)]
        far = self.m - kept
        del kept, near
        sums_x, sums_w, tilt_x, tilt_w = self.far(far)
        groups = 2 / s.block + 2 / s.group
        found.append(self.point("sums", level, share, groups, dx + sums_x, dw + sums_w))
        extra = 2 * groups + 2 * self.w.shape[1] / n
        dx, dw = dx + sums_x + tilt_x, dw + sums_w + tilt_w
        found.append(self.point("sums and tilt", level, share, extra, dx, dw))
        return found

    def far(self, far: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dx and dw of the sums, and what the tilt adds."""
        s, (n, v), d = self.setting, far.shape, self.w.shape[1]
        b, g = n // s.block, v // s.group
        parts = far.view(b, s.block, g, s.group)
        r, c = parts.sum(3), parts.sum(1)  # (B, I, G), (B, G, J)
        size = r.sum(1).unsqueeze(2)  # (B, G, 1)
        inverse = torch.where(size > 0, 1 / size, 0.0)
        x, w = self.x.view(b, s.block, d), self.w.view(g, s.group, d)
        mean_w = torch.bmm(c.transpose(0, 1), w).transpose(0, 1) * inverse  # (B, G, D)
        mean_x = torch.bmm(r.transpose(1, 2), x) * inverse  # (B, G, D)
        by_class = c.permute(1, 2, 0).contiguous()  # (G, J, B)
        dx = torch.bmm(r, mean_w).view(n, d)
        dw = torch.bmm(by_class, mean_x.transpose(0, 1).contiguous()).view(v, d)
        row_mass, class_mass = r.sum(2).view(n, 1), c.sum(0).view(v, 1)
        cov_x = covariance(self.x, row_mass, s.block)
        cov_w = covariance(self.w, class_mass, s.group)
        away_x = row_mass * self.x - torch.bmm(r, mean_x).view(n, d)
        down = torch.bmm(by_class, mean_w.transpose(0, 1).contiguous()).view(v, d)
        away_w = class_mass * self.w - down
        return dx, dw, away_x @ cov_w, away_w @ cov_x

    def point(
        self, rest: str, level: int, near: float, extra: float, dx: Tensor, dw: Tensor
    ) -> FrontierPoint:
        off = dw - self.dw
        by_class = off.norm(dim=1) / self.size_class
        deciles = by_class.nan_to_num(0.0).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        return FrontierPoint(
            self.setting.name, rest, level, near, 1 + 2 * near + extra,
            float((dx - self.dx).norm() / self.size_x), float(off.norm() / self.size_w), *deciles,
        )  # fmt: skip


def covariance(rows: Tensor, mass: Tensor, group: int) -> Tensor:
    """Of rows (N, D) about the means of their groups, weighted by mass (N, 1)."""
    weighted = (mass * rows).view(-1, group, rows.shape[1]).sum(1)
    total = mass.view(-1, group).sum(1, keepdim=True)
    mean = weighted / total.clamp_min(1e-30)
    away = rows - mean.repeat_interleave(group, 0)
    return (mass * away).T @ away / mass.sum()


LINES = {"dropped": ("#b8322a", ":"), "sums": ("#0b7a75", "-"), "sums and tilt": ("#c98a1b", "--")}
MARKS = dict(zip((s.name for s in SETTINGS), "s^oD", strict=True))


def write_frontier(out: Path, points: Sequence[FrontierPoint]) -> None:
    """`frontier.csv`, `frontier.png` and `classes.png` in the folder ``out``."""
    with (out / "frontier.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(FrontierPoint.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, name in zip(panels, ("error_dx", "error_dw"), strict=True):
        for setting, mark in MARKS.items():
            for rest, (colour, line) in LINES.items():
                own = [p for p in points if p.setting == setting and p.rest == rest]
                panel.plot(
                    [p.cost for p in own], [getattr(p, name) for p in own], color=colour,
                    linestyle=line, marker=mark, markersize=5, linewidth=1,
                )  # fmt: skip
        panel.axhline(0.005, color="#6b747b", linewidth=0.8, linestyle=(0, (4, 3)))
        panel.set_yscale("log")
        panel.set_xlabel("cost in GEMM-equivalents (dense: 3)")
        panel.set_title(f"error of {name[-2:]}, relative (dashed: 0.5 %)", loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    for setting, mark in MARKS.items():
        panels[0].plot([], [], color="#333333", marker=mark, linestyle="", label=setting)
    for rest, (colour, line) in LINES.items():
        panels[0].plot([], [], color=colour, linestyle=line, label=f"far {rest}")
    panels[0].legend(frameon=False, fontsize=7.5)
    figure.savefig(out / "frontier.png", dpi=150)
    _write_classes(out / "classes.png", points)


def _write_classes(path: Path, points: Sequence[FrontierPoint], level: int = 12) -> None:
    """How the error spreads over classes at one threshold: deciles 1, 5 and 9."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panel = figure.subplots()
    shown = [p for p in points if p.level == level]
    for at, p in enumerate(shown):
        colour = LINES[p.rest][0]
        panel.plot([p.class_10, p.class_90], [at, at], color=colour, linewidth=3, alpha=0.5)
        panel.plot(p.class_50, at, color=colour, marker=MARKS[p.setting])
    panel.set_yticks(range(len(shown)), [f"{p.setting}: far {p.rest}" for p in shown], fontsize=7.5)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.set_xlabel(f"error of a class's row of dw, relative to itself; τ = 2^-{level}; deciles")
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
