"""Every primitive in plain PyTorch: specification, fallback, and (in float64) oracle.

The functions here are what a backend provides; `kernels` and compiled modules repeat these names
and arguments and can be read against this file line by line. Shapes: x (N, D), w (V, D), b (V,),
target (N, K) int64 with -1 where there is none and each id once a row, class_vector (V,),
teacher (N, V). Statistics and gradients before their last rounding are float32, float64 for
float64 inputs.

    r = scale · x wᵀ + b          z = softcap · tanh(r / softcap)
    dz_j = Σ_k coefficient_k · basis_k(z_j)        dr_j = dz_j (1 - (z_j / softcap)²)
    dx = scale · dr w     dw = scale · drᵀ x     db = Σ_n dr     dscale = Σ_n x_n · (dr w)_n

`dx` is returned before the factor `scale`, since that is what `dscale` needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lossops.statistics import STATISTICS, is_log_sum, limit, outputs, temperature

TILE = 4096  # classes upcast at a time: 4·D·TILE bytes beside a half-precision w
PRODUCT = 2**22  # logits per product where no chunk is given, 16 MiB of float32
BLOCK = 2**18  # logits worked on at a time: a dozen temporaries of 1 MiB, in cache

Coefficients = Sequence[Tensor | None]
# target, class_vector, teacher, names, statistics, coefficients
Specification = tuple[
    Tensor | None, Tensor | None, Tensor | None, Sequence[str], Sequence[Tensor], Coefficients
]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of statistics and accumulators: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_logits(
    x: Tensor, w: Tensor, b: Tensor | None, scale: Tensor | None, softcap: float
) -> Tensor:
    """z (N, V) in the accumulate dtype; differentiable."""
    acc = accumulate_dtype(x.dtype)
    z = torch.cat([x.to(acc) @ tile.to(acc).T for tile in w.split(TILE)], 1)
    if scale is not None:
        z = z * scale.to(acc)
    if b is not None:
        z = z + b.to(acc)
    return softcap * torch.tanh(z / softcap) if softcap else z


def linear_statistics(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    softcap: float,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: Sequence[str],
) -> list[Tensor]:
    """Statistics straight from x and w; here some rows at a time, elsewhere by tiles."""

    def some(rows: slice) -> list[Tensor]:
        z = linear_logits(x[rows], w, b, scale, softcap)
        return logits_statistics(z, _at(target, rows), class_vector, _at(teacher, rows), names)

    return _by_rows(some, x.shape[0], w.shape[0], PRODUCT)


def linear_chunk_statistics(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    softcap: float,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: Sequence[str],
    wanted: Sequence[str],
    buffer: Tensor,
) -> list[Tensor]:
    """Statistics of a chunk of rows, leaving in ``buffer`` (N, V) what the gradient needs.

    ``wanted`` names the outputs that may get a coefficient. What the buffer holds is the
    backend's own business, the logits where there are no ``names``; its dtype is the accumulate
    dtype, or for the C++ backend one of 16 bits, see `schedules.kept_dtype`.
    """
    acc = buffer.dtype
    for c in range(0, w.shape[0], TILE):
        torch.mm(x.to(acc), w[c : c + TILE].to(acc).T, out=buffer[:, c : c + TILE])
    if scale is not None:
        buffer *= scale.to(acc)
    if b is not None:
        buffer += b.to(acc)
    if softcap:
        buffer.div_(softcap).tanh_().mul_(softcap)
    return logits_statistics(buffer, target, class_vector, teacher, names)


def linear_chunk_gradient(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    softcap: float,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: Sequence[str],
    wanted: Sequence[str],
    buffer: Tensor,
    statistics: Sequence[Tensor],
    coefficients: Coefficients,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    accumulate: bool,
) -> None:
    """Gradients of a chunk from its buffer, which is destroyed where it is in the accumulate dtype.

    ``coefficients``: ∂loss/∂statistic (N,) in the order of ``outputs(names)``, None for zero.
    ``dx`` (N, D) is overwritten; ``dw`` (V, D) and ``db`` (V,) are overwritten, or added to when
    ``accumulate``. All are in the accumulate dtype.
    """
    factor = linear_chunk_negatives(
        x, w, b, scale, softcap, target, class_vector, teacher, names, wanted, buffer, statistics,
        coefficients,
    )  # fmt: skip
    linear_products(x, w, scale, buffer, factor, dx, dw, db, accumulate)
    if target is not None:
        spec = (target, class_vector, teacher, names, statistics, coefficients)
        at_target = target_gradient(softcap, w.shape[0], *spec)
        add_targets(dx, dw, db, scaled_rows(x, scale, buffer.dtype), w, target, at_target)


def linear_chunk_negatives(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    softcap: float,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: Sequence[str],
    wanted: Sequence[str],
    buffer: Tensor,
    statistics: Sequence[Tensor],
    coefficients: Coefficients,
) -> Tensor:
    """The first half of a chunk's gradient: its buffer becomes dr of the negatives.

    Returns:
        f (N,): dr = f · buffer, 0 at the targets; here 1, elsewhere what a buffer of exponentials
        lacks.
    """
    spec = (target, class_vector, teacher, names, statistics, coefficients)
    for rows in row_blocks(x.shape[0], w.shape[0], BLOCK):
        z = buffer[rows]
        part = _negatives_gradient(z, *_spec_at(rows, spec))
        if softcap:
            part *= 1 - (z / softcap).square()
        z.copy_(part)
    return buffer.new_ones(x.shape[0])


def linear_products(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    buffer: Tensor,
    row_factor: Tensor,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    accumulate: bool,
) -> None:
    """The second half: dx, dw and db, as in `linear_chunk_gradient`, of dr = row_factor · buffer.

    The targets are the caller's.
    """
    acc = buffer.dtype
    f = row_factor.unsqueeze(1)  # (N, 1)
    xs = f * scaled_rows(x, scale, acc)
    if dx is not None:
        dx.zero_()
    for c in range(0, w.shape[0], TILE):
        tile = slice(c, c + TILE)
        if dx is not None:
            dx.addmm_(buffer[:, tile], w[tile].to(acc))
        if dw is not None:
            dw[tile].addmm_(buffer[:, tile].T, xs, beta=int(accumulate))
        if db is not None:
            db[tile].copy_(row_factor @ buffer[:, tile] + (db[tile] if accumulate else 0))
    if dx is not None:
        dx *= f


def linear_negatives(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    softcap: float,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: Sequence[str],
    statistics: Sequence[Tensor],
    coefficients: Coefficients,
    first: int,
    buffer: Tensor,
) -> None:
    """dr of the negatives among the n classes from ``first`` on, into ``buffer`` (N, n).

    The logits are computed again; at the targets dr is 0.
    """
    n = buffer.shape[1]
    tile = slice(first, first + n)
    z = linear_logits(x, w[tile], None if b is None else b[tile], scale, softcap)
    inside = None if target is None else within(target, first, n)
    vector = None if class_vector is None else class_vector[tile]
    taught = None if teacher is None else teacher[:, tile]
    spec = (names, statistics, coefficients)
    dz = _negatives_gradient(z, inside, vector, taught, *spec, w.shape[0], first)
    if softcap:
        dz *= 1 - (z / softcap).square()
    buffer.copy_(dz)


def far_sums(
    buffer: Tensor, row_factor: Tensor, limit: Tensor, block: int, group: int
) -> list[Tensor]:
    """Near columns, and sums of the far ones, of M = row_factor · buffer (N, V).

    A column is near to a block of ``block`` rows where some |M_ij| > limit_i.

    Returns:
        near (B, V) bool; over the far columns r (N, G) by groups of ``group`` classes and c (B, V)
        by blocks; where M has both signs also r and c of |M|.
    """
    n, v = buffer.shape
    m = row_factor.unsqueeze(1) * buffer
    heights = [block] * (n // block) + ([n % block] if n % block else [])
    near = torch.stack(
        [(part.abs() > t.unsqueeze(1)).any(0)
         for part, t in zip(m.split(heights), limit.split(heights), strict=True)]
    ) if n else torch.zeros(0, v, dtype=torch.bool, device=buffer.device)  # fmt: skip
    far = m.masked_fill(near.repeat_interleave(block, 0)[:n], 0.0)

    def sums(m: Tensor) -> list[Tensor]:
        rows = torch.stack([part.sum(1) for part in m.split(group, 1)], 1)
        columns = [part.sum(0) for part in m.split(heights)]
        return [rows, torch.stack(columns) if columns else m.new_zeros(0, v)]

    return [near, *sums(far), *(sums(far.abs()) if n and m.amin() < 0 else [])]


def scaled_rows(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale · x in the accumulate dtype."""
    return x.to(dtype) if scale is None else x.to(dtype) * scale.to(dtype)


def linear_gradient(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    scale: Tensor | None,
    softcap: float,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: Sequence[str],
    statistics: Sequence[Tensor],
    coefficients: Coefficients,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """Gradients from statistics alone: the logits are recomputed, one slab of classes at a time.

    ``dx`` (N, D) is in the accumulate dtype; ``dw`` and ``db`` are in the dtype of w and b,
    rounded once. All are overwritten.
    """
    acc = accumulate_dtype(x.dtype)
    spec = (target, class_vector, teacher, names, statistics, coefficients)
    xs = scaled_rows(x, scale, acc)
    at_target = None
    if target is not None:
        at_target = target_gradient(softcap, w.shape[0], *spec)
    if dx is not None:
        dx.zero_()
    size = min(TILE, max(256, BLOCK // max(x.shape[0], 1)))
    for c in range(0, w.shape[0], size):
        tile = slice(c, c + size)
        wt = w[tile].to(acc)
        z = linear_logits(x, w[tile], None if b is None else b[tile], scale, softcap)
        inside = None if target is None else within(target, c, wt.shape[0])
        vector = None if class_vector is None else class_vector[tile]
        taught = None if teacher is None else teacher[:, tile]
        dz = _negatives_gradient(z, inside, vector, taught, *spec[3:], w.shape[0], c)
        if softcap:
            dz *= 1 - (z / softcap).square()
        dw_tile = dz.T @ xs if dw is not None else None
        db_tile = dz.sum(0) if db is not None else None
        if dx is not None:
            dx.addmm_(dz, wt)
        if inside is not None and at_target is not None:
            add_targets(dx, dw_tile, db_tile, xs, wt, inside, at_target)
        if dw is not None and dw_tile is not None:
            dw[tile].copy_(dw_tile)
        if db is not None and db_tile is not None:
            db[tile].copy_(db_tile)


def logits_statistics(
    z: Tensor,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: Sequence[str],
) -> list[Tensor]:
    """Statistics of existing logits (N, V), in the order of ``outputs(names)``; differentiable."""

    def some(rows: slice) -> list[Tensor]:
        return _block_statistics(
            z[rows], _at(target, rows), class_vector, _at(teacher, rows), names
        )

    return _by_rows(some, z.shape[0], z.shape[1], BLOCK)


def _block_statistics(
    z: Tensor,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: Sequence[str],
) -> list[Tensor]:
    z = z.to(accumulate_dtype(z.dtype))
    n, v = z.shape
    mask = torch.zeros_like(z, dtype=torch.bool)
    if target is not None:
        mask = target_mask(target, n, v)
    negatives = z.masked_fill(mask, -torch.inf)
    top = negatives.detach().amax(1) if v else z.new_full((n,), -torch.inf)
    m = torch.where(top.isfinite(), top, 0.0)  # (N,)
    rel = z - m.unsqueeze(1)
    neg = rel.masked_fill(mask, -torch.inf)
    found: dict[str, Tensor] = {"shift": m}
    for name in names:
        if name == "target":
            assert target is not None
            found["target"] = gather(z, target)
        elif name == "lse":
            found["lse"] = logsumexp(neg)
        elif name == "entropy":
            q = (neg - logsumexp(neg).unsqueeze(1)).masked_fill(neg == -torch.inf, -torch.inf).exp()
            found["mean"] = (q * neg.masked_fill(q == 0, 0.0)).sum(1)
        elif name == "variance":
            q = (neg - found["lse"].unsqueeze(1)).masked_fill(neg == -torch.inf, -torch.inf).exp()
            away = neg.masked_fill(q == 0, 0.0) - found["mean"].unsqueeze(1)
            found["variance"] = (q * away.square()).sum(1)
        elif name == "max":
            found["max"], found["argmax"] = _largest(neg)
        elif name == "runner_up":
            taken = F.one_hot(found["argmax"].clamp_min(0), v).bool() if v else mask
            found["runner_up"], found["runner_up_index"] = _largest(
                neg.masked_fill(taken, -torch.inf)
            )
        elif name == "below_target":
            assert target is not None
            above = neg.detach() >= gather(rel.detach(), target[:, :1])
            found["below_target"], found["below_target_index"] = _largest(
                neg.masked_fill(above, -torch.inf)
            )
        elif name == "sum":
            found["average"] = rel.mean(1)
        elif name == "sumsq":
            found["moment"] = (rel - rel.mean(1, keepdim=True)).square().sum(1)
        elif name == "softplus":
            found["softplus"] = F.softplus(z.masked_fill(mask, -torch.inf), threshold=50).sum(1)
        elif name == "stable_sum":
            found["stable_sum"] = stable(z.masked_fill(mask, -torch.inf)).sum(1)
        elif name == "weighted_sum":
            assert class_vector is not None
            found["weighted_sum"] = (rel * class_vector.to(rel.dtype)).sum(1)
        elif name == "teacher":
            assert teacher is not None
            t = teacher.to(rel.dtype)
            t = t if class_vector is None else t * class_vector.to(rel.dtype)
            masked = (t == 0) & (rel == -torch.inf)  # elsewhere z is the gradient of t, even at 0
            found["teacher"] = (rel.masked_fill(masked, 0.0) * t).sum(1)
        else:
            kept = torch.where(neg > limit(name) - m.unsqueeze(1), -m.unsqueeze(1), neg)
            found[name] = logsumexp(kept * temperature(name))
    return [found[name] for name in outputs(names)]


def logits_gradient(
    z: Tensor,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: Sequence[str],
    statistics: Sequence[Tensor],
    coefficients: Coefficients,
    out: Tensor,
) -> None:
    """dz (N, V) of logits that exist, targets included, into ``out``, which may be ``z`` itself."""
    spec = (target, class_vector, teacher, names, statistics, coefficients)
    for rows in row_blocks(z.shape[0], z.shape[1], BLOCK):
        part = _spec_at(rows, spec)
        dz = _negatives_gradient(z[rows].to(accumulate_dtype(z.dtype)), *part)
        if target is not None:
            dz.scatter_add_(1, target[rows].clamp_min(0), target_gradient(0.0, z.shape[1], *part))
        out[rows] = dz


def target_gradient(
    softcap: float,
    num_classes: int,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: Sequence[str],
    statistics: Sequence[Tensor],
    coefficients: Coefficients,
) -> Tensor:
    """dr at the target ids, (N, K), 0 where there is none."""
    assert target is not None
    stat = dict(zip(outputs(names), statistics, strict=True))
    coef = dict(zip(outputs(names), coefficients, strict=True))
    z, absent, ids = stat["target"], target < 0, target.clamp_min(0)
    dz = coef["target"]
    dz = torch.zeros_like(z) if dz is None else dz.clone()
    if (c := coef.get("average")) is not None:
        dz += (c / num_classes).unsqueeze(1)
    if (c := coef.get("moment")) is not None:
        rel = z - stat["shift"].unsqueeze(1)
        dz += 2 * c.unsqueeze(1) * (rel - stat["average"].unsqueeze(1))
    if (c := coef.get("weighted_sum")) is not None and class_vector is not None:
        dz += c.unsqueeze(1) * class_vector.to(dz.dtype)[ids]
    if (c := coef.get("teacher")) is not None and teacher is not None:
        t = teacher.gather(1, ids).to(dz.dtype)
        t = t if class_vector is None else t * class_vector.to(dz.dtype)[ids]
        dz += c.unsqueeze(1) * t
    if softcap:
        dz *= 1 - (z / softcap).square()
    return dz.masked_fill(absent, 0.0)


def add_targets(
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    xs: Tensor,
    w: Tensor,
    target: Tensor,
    value: Tensor,
) -> None:
    """Add the sparse part of dr: value (N, K) at target (N, K), -1 where there is none."""
    for ids, v in zip(target.unbind(1), value.unbind(1), strict=True):
        v = v.masked_fill(ids < 0, 0.0)
        y = ids.clamp_min(0)
        if dx is not None:
            dx += v.unsqueeze(1) * w[y].to(dx.dtype)
        if dw is not None:
            dw.index_add_(0, y, v.unsqueeze(1) * xs)
        if db is not None:
            db.index_add_(0, y, v)


def _negatives_gradient(
    z: Tensor,
    target: Tensor | None,
    class_vector: Tensor | None,
    teacher: Tensor | None,
    names: Sequence[str],
    statistics: Sequence[Tensor],
    coefficients: Coefficients,
    num_classes: int | None = None,
    first_class: int = 0,
) -> Tensor:
    """dz of the negatives among these columns, 0 at the targets."""
    n, v = z.shape
    stat = dict(zip(outputs(names), statistics, strict=True))
    coef = dict(zip(outputs(names), coefficients, strict=True))
    rel = z - stat["shift"].unsqueeze(1)
    dz = torch.zeros_like(z)
    zero = torch.zeros_like(z)

    def softmax(t: float, lse: Tensor) -> Tensor:
        floor = torch.where(lse == -torch.inf, 0.0, lse)  # no negatives: q = 0, not 0 / 0
        return torch.exp(t * rel - floor.unsqueeze(1))

    if any(coef.get(output) is not None for output in ("lse", "mean", "variance")):
        q = softmax(1.0, stat["lse"])
        c = coef.get("lse")
        if c is not None:
            dz += c.unsqueeze(1) * q
        if (c := coef.get("mean")) is not None:
            away = 1 + rel - stat["mean"].unsqueeze(1)
            dz += c.unsqueeze(1) * torch.where(q == 0, zero, q * away)
        if (c := coef.get("variance")) is not None:
            away = rel - stat["mean"].unsqueeze(1)
            slope = q * (away * (away + 2) - stat["variance"].unsqueeze(1))
            dz += c.unsqueeze(1) * torch.where(q == 0, zero, slope)
    for name in names:
        if is_log_sum(name) and (c := coef[name]) is not None:
            t = temperature(name)
            q = softmax(t, stat[name])
            dz += (t * c).unsqueeze(1) * torch.where(z > limit(name), 0.0, q)
    if (c := coef.get("softplus")) is not None:
        dz += c.unsqueeze(1) * torch.sigmoid(z)
    if (c := coef.get("stable_sum")) is not None:
        dz += c.unsqueeze(1) * torch.where(z < 0, stable(z).square(), 1.0)
    if (c := coef.get("average")) is not None:
        dz += (c / (num_classes or v)).unsqueeze(1)
    if (c := coef.get("moment")) is not None:
        dz += 2 * c.unsqueeze(1) * (rel - stat["average"].unsqueeze(1))
    if (c := coef.get("weighted_sum")) is not None and class_vector is not None:
        dz += c.unsqueeze(1) * class_vector.to(dz.dtype)
    if (c := coef.get("teacher")) is not None and teacher is not None:
        taught = teacher.to(dz.dtype)
        taught = taught if class_vector is None else taught * class_vector.to(dz.dtype)
        dz += c.unsqueeze(1) * taught
    for name in ("max", "runner_up", "below_target"):
        if (c := coef.get(name)) is not None:
            ids = stat[STATISTICS[name].outputs[1]].unsqueeze(1)
            local = within(ids, first_class, v)
            at = c.unsqueeze(1).masked_fill(local < 0, 0.0)
            dz.scatter_add_(1, local.clamp_min(0), at)
    return dz if target is None else dz.masked_fill_(target_mask(target, n, v), 0.0)


def row_blocks(n: int, v: int, size: int) -> Iterator[slice]:
    """Slices of rows of at most ``size`` logits; one empty slice where there are no rows."""
    step = max(1, size // max(v, 1))
    for start in range(0, max(n, 1), step):
        yield slice(start, min(start + step, n))


def _by_rows(function: Callable[[slice], list[Tensor]], n: int, v: int, size: int) -> list[Tensor]:
    """Outputs of ``function`` on blocks of rows, put together."""
    parts = [function(rows) for rows in row_blocks(n, v, size)]
    return parts[0] if len(parts) == 1 else [torch.cat(p) for p in zip(*parts, strict=True)]


def _at(t: Tensor | None, rows: slice) -> Tensor | None:
    return None if t is None else t[rows]


def _spec_at(rows: slice, spec: Specification) -> Specification:
    """What a gradient needs, at some of the rows."""
    target, class_vector, teacher, names, statistics, coefficients = spec
    stats, coefs = [s[rows] for s in statistics], [_at(c, rows) for c in coefficients]
    return _at(target, rows), class_vector, _at(teacher, rows), names, stats, coefs


def within(ids: Tensor, first: int, count: int) -> Tensor:
    """ids relative to ``first``, -1 outside [first, first + count)."""
    inside = (ids >= first) & (ids < first + count)
    return torch.where(inside, ids - first, -1)


def target_mask(target: Tensor, n: int, v: int) -> Tensor:
    """(N, V), True at the target ids."""
    # Absent ids land in an extra column, so that they cannot race with a real target 0.
    mask = torch.zeros(n, v + 1, dtype=torch.bool, device=target.device)
    return mask.scatter_(1, torch.where(target < 0, v, target), True)[:, :v]


def gather(rel: Tensor, target: Tensor) -> Tensor:
    """rel at the target ids (N, K), -inf where there is none."""
    if not rel.shape[1]:
        return rel.new_full(target.shape, -torch.inf)
    return rel.gather(1, target.clamp_min(0)).masked_fill(target < 0, -torch.inf)


def logsumexp(z: Tensor) -> Tensor:
    """torch.logsumexp over the last dim, -inf with gradient 0 for rows of -inf."""
    empty = (z == -torch.inf).all(1)
    lse = torch.logsumexp(z.masked_fill(empty.unsqueeze(1), 0.0), 1) if z.shape[1] else z.sum(1)
    return lse.masked_fill(empty, -torch.inf)


def stable(z: Tensor) -> Tensor:
    """s(z) = 1 + z for z ≥ 0, 1 / (1 - z) below; 0 at -inf."""
    below = z < 0
    return torch.where(below, 1 / (1 - torch.where(below, z, 0.0)), 1 + z.clamp_min(0.0))


def _largest(z: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of each row and its lowest id; -inf and -1 for rows of -inf."""
    if not z.shape[1]:
        none = torch.full(z.shape[:1], -1, dtype=torch.int64, device=z.device)
        return z.new_full(z.shape[:1], -torch.inf), none
    value = z.detach().amax(1)
    index = (z.detach() == value.unsqueeze(1)).to(torch.uint8).argmax(1)
    empty = value == -torch.inf
    value = z.gather(1, index.unsqueeze(1)).squeeze(1)
    return value, torch.where(empty, -1, index)
