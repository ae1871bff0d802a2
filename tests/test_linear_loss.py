"""linear_loss, linear_statistics and linear_log_prob against autograd on stored logits, in float64.

The oracles below see logits (N, V) and use nothing of lossops.
"""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossops import (
    LinearLossOptions,
    RowStatistics,
    linear_cross_entropy,
    linear_log_prob,
    linear_loss,
    linear_statistics,
    loss_fn,
)

N, D, V = 23, 7, 37
CHUNKS = LinearLossOptions(schedule="one_sweep", chunk_rows=5)  # the last chunk has 3 rows
WHOLE = LinearLossOptions(schedule="one_sweep")
TWO = LinearLossOptions(schedule="two_sweeps")
SCHEDULES = pytest.mark.parametrize("options", [CHUNKS, WHOLE, TWO], ids=["chunks", "whole", "two"])


class Head(NamedTuple):
    """Leaves of a linear head and a target with two ignored rows, at 3 and N - 1."""

    x: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor
    target: torch.Tensor

    @property
    def leaves(self):
        return self[:4]

    @property
    def counted(self):
        return self.target >= 0

    @property
    def ids(self):
        """Targets that can be gathered."""
        return self.target.clamp_min(0)

    def logits(self, softcap=None):
        z = self.scale * (self.x @ self.w.T) + self.b
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    def keywords(self):
        return {"linear_bias": self.b, "logit_scale": self.scale}


@pytest.fixture
def head():
    draw = torch.Generator().manual_seed(7)

    def leaf(*shape, factor=1.0):
        t = torch.randn(shape, dtype=torch.float64, generator=draw) * factor
        return t.requires_grad_()

    target = torch.randint(V, (N,), generator=draw)
    target[[3, N - 1]] = -100
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    return Head(leaf(N, D), leaf(V, D), leaf(V, factor=0.3), scale, target)


def assert_same(found, expected):
    """Equal to the rounding of float64, None where None."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def gradients(value, inputs, upstream=None, **keywords):
    return torch.autograd.grad(value, inputs, upstream, **keywords)


def at(z, ids):
    return z.gather(1, ids.unsqueeze(1)).squeeze(1)


def negatives(z, ids):
    return z.scatter(1, ids.unsqueeze(1), -torch.inf)


# A loss: statistics to ask for, F of the statistics, the same of logits and target ids.


def focal(s):
    return -torch.expm1(s.log_p).square() * s.log_p


def focal_oracle(z, y):
    log_p = at(z.log_softmax(1), y)
    return -(1 - log_p.exp()).square() * log_p


def margin(s):
    return -F.logsigmoid(s.target_minus_lse - 0.4)


def margin_oracle(z, y):
    return F.cross_entropy(z - 0.4 * F.one_hot(y, V).to(z.dtype), y, reduction="none")


def squentropy(s):
    return -s.log_p + (s.sumsq - s.target.square()) / (V - 1)


def squentropy_oracle(z, y):
    others = (z.square() * (1 - F.one_hot(y, V))).sum(1)
    return F.cross_entropy(z, y, reduction="none") + others / (V - 1)


def two_margins(s):
    return F.relu(1 + s.max - s.target) + 0.3 * F.relu(2 + s.runner_up - s.target)


def two_margins_oracle(z, y):
    top = negatives(z, y).topk(2, 1).values
    return F.relu(1 + top[:, 0] - at(z, y)) + 0.3 * F.relu(2 + top[:, 1] - at(z, y))


def dual_focal(s):
    p, below = s.log_p.exp(), (s.below_target - s.logsumexp).exp()
    return -((1 - p + below) ** 3) * s.log_p


def dual_focal_oracle(z, y):
    below = z.masked_fill(z >= at(z, y).unsqueeze(1), -torch.inf).amax(1)
    log_p = at(z.log_softmax(1), y)
    return -((1 - log_p.exp() + (below - z.logsumexp(1)).exp()) ** 3) * log_p


def sigmoids(s):
    return s.softplus + F.softplus(-s.target)


def sigmoids_oracle(z, y):
    return F.binary_cross_entropy_with_logits(z, F.one_hot(y, V).to(z.dtype), reduction="none").sum(
        1
    )


def collision(s):
    return (s.lse_at(2) - 2 * s.logsumexp).exp() + (2 * s.log_p).exp() - s.log_p


def collision_oracle(z, y):
    return z.softmax(1).square().sum(1) + F.cross_entropy(z, y, reduction="none")


def confident(s):
    return -s.log_p - 0.2 * s.entropy + 0.01 * s.logsumexp.square()


def confident_oracle(z, y):
    log_p = z.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return -at(log_p, y) - 0.2 * entropy + 0.01 * z.logsumexp(1).square()


LOSSES = {
    "focal": (("lse",), focal, focal_oracle),
    "margin": (("lse", "target"), margin, margin_oracle),
    "squentropy": (("lse", "sumsq"), squentropy, squentropy_oracle),
    "two_margins": (("runner_up",), two_margins, two_margins_oracle),
    "dual_focal": (("lse", "below_target"), dual_focal, dual_focal_oracle),
    "sigmoids": (("softplus",), sigmoids, sigmoids_oracle),
    "collision": (("lse", "lse@2"), collision, collision_oracle),
    "confident": (("entropy",), confident, confident_oracle),
}


@SCHEDULES
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients(name, softcap, options, head, backend):
    names, loss_fn, oracle = LOSSES[name]
    loss = linear_loss(
        head.x, head.w, head.target, loss_fn, names=names, softcap=softcap, options=options,
        backend=backend, **head.keywords(),
    )  # fmt: skip
    each = oracle(head.logits(softcap), head.ids)
    expected = each[head.counted].mean()
    assert_same(loss, expected)
    assert_same(gradients(3 * loss, head.leaves), gradients(3 * expected, head.leaves))


@SCHEDULES
def test_no_target(options, head, backend):
    def loss_fn(s):
        return s.softplus - s.logsumexp + s.max

    loss = linear_loss(
        head.x, head.w, None, loss_fn, names=("softplus", "lse", "max"), options=options,
        backend=backend, **head.keywords(),
    )  # fmt: skip
    z = head.logits()
    expected = (F.softplus(z).sum(1) - z.logsumexp(1) + z.amax(1)).mean()
    assert_same(loss, expected)
    assert_same(gradients(loss, head.leaves), gradients(expected, head.leaves))


@SCHEDULES
def test_class_vector(options, head, backend):
    vector = torch.linspace(-1, 1, V, dtype=torch.float64)

    def loss_fn(s):
        return s.weighted_sum.tanh() - s.log_p

    loss = linear_loss(
        head.x, head.w, head.target, loss_fn, names=("lse", "weighted_sum"), options=options,
        class_vector=vector, backend=backend, **head.keywords(),
    )  # fmt: skip
    z = head.logits()
    each = (z @ vector).tanh() + F.cross_entropy(z, head.ids, reduction="none")
    expected = each[head.counted].mean()
    assert_same(loss, expected)
    assert_same(gradients(loss, head.leaves), gradients(expected, head.leaves))


@SCHEDULES
def test_row_inputs_follow_their_rows(options, head, backend):
    old = torch.randn(N, dtype=torch.float64)
    advantage = torch.randn(N, 2, dtype=torch.float64)

    def clipped(s, *, old, advantage):
        ratio = (s.log_p - old).exp()
        bounded = ratio.clamp(0.8, 1.2)
        return -torch.minimum(ratio * advantage[:, 0], bounded * advantage[:, 1])

    loss = linear_loss(
        head.x, head.w, head.target, clipped, row_inputs={"old": old, "advantage": advantage},
        options=options, backend=backend, **head.keywords(),
    )  # fmt: skip
    ratio = (at(head.logits().log_softmax(1), head.ids) - old).exp()
    bounded = ratio.clamp(0.8, 1.2)
    each = -torch.minimum(ratio * advantage[:, 0], bounded * advantage[:, 1])
    expected = each[head.counted].mean()
    assert_same(loss, expected)
    assert_same(gradients(loss, head.leaves), gradients(expected, head.leaves))


def test_leading_dims_of_everything(head, backend):
    x, target = head.x[:20].reshape(4, 5, D), head.target[:20].reshape(4, 5)
    weights = torch.rand(4, 5, dtype=torch.float64)
    keywords = {"options": CHUNKS, "backend": backend, "sample_weight": weights}

    def loss_fn(s, factor):
        assert s.log_p.shape == factor.shape[:1]
        return s.log_p * factor.sum(1)

    factor = torch.rand(4, 5, 3, dtype=torch.float64)
    loss = linear_loss(x, head.w, target, loss_fn, row_inputs={"factor": factor}, **keywords)
    keywords["sample_weight"] = weights.flatten()
    flat = linear_loss(
        head.x[:20], head.w, head.target[:20], loss_fn,
        row_inputs={"factor": factor.flatten(0, 1)}, **keywords,
    )  # fmt: skip
    assert_same(loss, flat)
    one = linear_loss(
        x[0, 0], head.w, target[0, 0], loss_fn, row_inputs={"factor": factor[0, 0]},
        reduction="none", backend=backend,
    )  # fmt: skip
    assert one.shape == ()


class Temperature(nn.Module):
    """-log σ(e^t (target - lse) + c): two parameters inside F."""

    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.c = nn.Parameter(torch.tensor([-0.2], dtype=torch.float64))

    def forward(self, s):
        return -F.logsigmoid(self.t.exp() * s.target_minus_lse + self.c)

    def oracle(self, z, y):
        odds = at(z, y) - negatives(z, y).logsumexp(1)
        return -F.logsigmoid(self.t.exp() * odds + self.c)


@SCHEDULES
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_parameters_get_gradients(options, reduction, head, backend):
    model = Temperature()
    wanted = (*head.leaves, *model.parameters())
    loss = linear_loss(
        head.x, head.w, head.target, model, parameters=model.parameters(), reduction=reduction,
        options=options, backend=backend, **head.keywords(),
    )  # fmt: skip
    expected = getattr(model.oracle(head.logits(), head.ids)[head.counted], reduction)()
    assert_same(loss, expected)
    found = gradients(2 * loss, wanted, retain_graph=True)
    assert_same(found, gradients(2 * expected, wanted))
    assert_same(gradients(2 * loss, wanted), found)  # the second backward recomputes


def test_parameters_alone_want_a_gradient(head, backend):
    model = Temperature()
    loss = linear_loss(
        head.x.detach(), head.w.detach(), head.target, model,
        parameters=tuple(model.parameters()), options=CHUNKS, backend=backend,
    )  # fmt: skip
    expected = model.oracle(head.x @ head.w.T, head.ids)[head.counted].mean()
    wanted = tuple(model.parameters())
    assert_same(gradients(loss, wanted), gradients(expected, wanted))


def test_frozen_unused_and_repeated_parameters(head, backend):
    model, unused = Temperature(), torch.ones(2, requires_grad=True)
    model.c.requires_grad_(False)
    loss = linear_loss(
        head.x, head.w, head.target, model,
        parameters=(*model.parameters(), unused, model.t),
        options=CHUNKS, backend=backend,
    )  # fmt: skip
    expected = model.oracle(head.x @ head.w.T, head.ids)[head.counted].mean()
    assert_same(gradients(loss, (model.t, head.x), retain_graph=True),
                gradients(expected, (model.t, head.x)))  # fmt: skip
    assert not gradients(loss, unused)[0].any()


def test_closures_take_two_sweeps(head, backend):
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    factor = 2 * t  # not a leaf: its leaf is what wants the gradient

    def loss_fn(s):
        return -F.logsigmoid(factor * s.target_minus_lse)

    loss = linear_loss(head.x, head.w, head.target, loss_fn, backend=backend)
    z = head.x @ head.w.T
    odds = at(z, head.ids) - negatives(z, head.ids).logsumexp(1)
    expected = -F.logsigmoid(2 * t * odds)[head.counted].mean()
    assert_same(loss, expected)
    wanted = (head.x, head.w, t)
    assert_same(gradients(loss, wanted), gradients(expected, wanted))


@pytest.mark.parametrize("given", ["leaf", "derived"])
def test_parameters_through_a_graph_outside_of_f(given, head, backend):
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    factor = t.exp()  # saves its result: each of the five chunks goes back through this graph

    def loss_fn(s):
        return -F.logsigmoid(factor * s.target_minus_lse)

    parameters = (t,) if given == "leaf" else (factor,)
    loss = linear_loss(
        head.x, head.w, head.target, loss_fn, parameters=parameters, options=CHUNKS,
        backend=backend,
    )  # fmt: skip
    z = head.x @ head.w.T
    odds = at(z, head.ids) - negatives(z, head.ids).logsumexp(1)
    expected = -F.logsigmoid(t.exp() * odds)[head.counted].mean()
    wanted = (head.x, head.w, t)
    assert_same(gradients(loss, wanted), gradients(expected, wanted))


def test_loss_across_rows(head, backend):
    """rowwise=False: F sees all rows at once, here as sequences of five."""
    x, target = head.x[:20], head.target[:20].clamp_min(0)
    seen = []

    def sequences(s):
        seen.append(s.log_p.shape)
        likelihood = s.log_p.reshape(4, 5).mean(1)
        return -F.logsigmoid(likelihood - likelihood.mean()).repeat_interleave(5)

    loss = linear_loss(x, head.w, target, sequences, rowwise=False, backend=backend)
    likelihood = at((x @ head.w.T).log_softmax(1), target).reshape(4, 5).mean(1)
    expected = -F.logsigmoid(likelihood - likelihood.mean()).mean()
    assert seen == [(20,)]
    assert_same(loss, expected)
    assert_same(gradients(loss, (x, head.w)), gradients(expected, (x, head.w)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_with_class_and_row_weights(reduction, head, backend):
    weight = torch.linspace(0.5, 2, V, dtype=torch.float64)
    rows = torch.rand(N, dtype=torch.float64, requires_grad=True)
    wanted = (*head.leaves, rows)
    loss = linear_loss(
        head.x, head.w, head.target, focal, weight=weight, sample_weight=rows,
        reduction=reduction, backend=backend, **head.keywords(),
    )  # fmt: skip
    u = rows * weight[head.ids] * head.counted
    expected = focal_oracle(head.logits(), head.ids) * u
    if reduction != "none":
        expected = expected.sum()
    if reduction == "mean":
        expected = expected / u.sum()
    assert_same(loss, expected)
    upstream = torch.randn_like(expected)
    assert_same(gradients(loss, wanted, upstream), gradients(expected, wanted, upstream))


def test_row_inputs_with_a_gradient(head, backend):
    scale = torch.rand(N, dtype=torch.float64, requires_grad=True)

    def loss_fn(s, scale):
        return -F.logsigmoid(scale * s.target_minus_lse)

    loss = linear_loss(
        head.x, head.w, head.target, loss_fn, row_inputs={"scale": scale}, backend=backend
    )
    z = head.x @ head.w.T
    odds = at(z, head.ids) - negatives(z, head.ids).logsumexp(1)
    expected = -F.logsigmoid(scale * odds)[head.counted].mean()
    wanted = (head.x, scale)
    assert_same(gradients(loss, wanted), gradients(expected, wanted))


@SCHEDULES
def test_ignored_rows_with_infinite_logits(options, head, backend):
    """F gets finite numbers for them and the loss is right; their x puts NaN into dw, as plain."""
    x = head.x.detach().clone()
    x[3] = torch.inf
    x.requires_grad_()

    def loss_fn(s):
        assert all(torch.isfinite(t).all() for t in s.values.values())
        return focal(s)

    loss = linear_loss(x, head.w, head.target, loss_fn, options=options, backend=backend)
    expected = focal_oracle(head.x @ head.w.T, head.ids)[head.counted].mean()
    assert_same(loss, expected)
    (dx,), (expected_dx,) = gradients(loss, x), gradients(expected, head.x)
    assert_same(dx[head.counted], expected_dx[head.counted])


@SCHEDULES
def test_all_rows_ignored(options, head, backend):
    target = torch.full((N,), -1)
    loss = linear_loss(
        head.x, head.w, target, focal, ignore_index=-1, options=options, backend=backend
    )
    assert loss == 0
    assert not any(g.any() for g in gradients(loss, (head.x, head.w)))


@SCHEDULES
def test_no_rows(options, head, backend):
    loss = linear_loss(head.x[:0], head.w, head.target[:0], focal, options=options, backend=backend)
    assert loss == 0
    assert not gradients(loss, head.w)[0].any()


def test_one_sweep_of_no_rows_in_no_memory(head):
    options = LinearLossOptions(schedule="one_sweep", max_workspace_bytes=1)
    x, w = head.x[:0].bfloat16(), head.w.bfloat16()
    assert linear_loss(x, w, head.target[:0], focal, options=options) == 0


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 3), (0, 1, 2, 3)])
@SCHEDULES
def test_any_subset_of_gradients(wanted, options, head, backend):
    leaves = [t if i in wanted else t.detach() for i, t in enumerate(head.leaves)]
    x, w, b, scale = leaves
    chosen = [leaves[i] for i in wanted]
    loss = linear_loss(
        x, w, head.target, focal, linear_bias=b, logit_scale=scale, options=options,
        backend=backend,
    )  # fmt: skip
    expected = focal_oracle(scale * (x @ w.T) + b, head.ids)[head.counted].mean()
    assert_same(gradients(loss, chosen), gradients(expected, chosen))


@SCHEDULES
def test_second_backward(options, head, backend):
    loss = linear_loss(
        head.x, head.w, head.target, focal, options=options, backend=backend, **head.keywords()
    )
    first = [g.clone() for g in gradients(loss, head.leaves, retain_graph=True)]
    assert_same(gradients(0.5 * loss, head.leaves), tuple(0.5 * g for g in first))
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, head.leaves)


@SCHEDULES
def test_input_changed_before_backward(options, head, backend):
    w = head.w.detach().clone().requires_grad_()
    loss = linear_loss(head.x, w, head.target, focal, options=options, backend=backend)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@SCHEDULES
def test_second_derivatives(options, backend):
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(3, 2, dtype=torch.float64, generator=draw, requires_grad=True)
    w = torch.randn(5, 2, dtype=torch.float64, generator=draw, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, generator=draw, requires_grad=True)
    scale = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([4, -100, 1])

    def loss(x, w, b, scale):
        return linear_loss(
            x, w, target, focal, linear_bias=b, logit_scale=scale, softcap=4.0, options=options,
            backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (x, w, b, scale), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (x, w, b, scale), fast_mode=True)


def test_gradient_penalty(head, backend):
    """A penalty on the gradient, as users write it, also with `parameters` and row inputs."""

    def penalised(loss, x):
        (dx,) = gradients(loss, x, create_graph=True)
        return loss + dx.square().sum()

    loss = linear_loss(head.x, head.w, head.target, focal, options=CHUNKS, backend=backend)
    expected = focal_oracle(head.x @ head.w.T, head.ids)[head.counted].mean()
    wanted = (head.x, head.w)
    assert_same(
        gradients(penalised(loss, head.x), wanted), gradients(penalised(expected, head.x), wanted)
    )
    model = Temperature()
    each = torch.linspace(0.5, 1.5, len(head.x), dtype=head.x.dtype).requires_grad_()

    def weighted(stats, each):
        return each * model(stats)

    wanted = (head.x, head.w, model.t, each)
    for options in (CHUNKS, TWO):
        losses = model.oracle(head.x @ head.w.T, head.ids)[head.counted]
        expected = (each[head.counted] * losses).mean()
        loss = linear_loss(
            head.x, head.w, head.target, weighted, options=options, row_inputs={"each": each},
            parameters=tuple(model.parameters()), backend=backend,
        )  # fmt: skip
        assert_same(
            gradients(penalised(loss, head.x), wanted),
            gradients(penalised(expected, head.x), wanted),
        )


def test_third_derivatives_with_parameters(head, backend):
    """Of the weight and of what F closes over, in one sweep."""
    model = Temperature()
    wanted = (head.x, model.t)

    def again(gradients_of):
        return gradients(sum(g.square().sum() for g in gradients_of), wanted, create_graph=True)

    losses = model.oracle(head.x @ head.w.T, head.ids)[head.counted]
    ours = linear_loss(
        head.x, head.w, head.target, model, options=CHUNKS, backend=backend,
        parameters=tuple(model.parameters()),
    )  # fmt: skip
    first = [gradients(loss, wanted, create_graph=True) for loss in (ours, losses.mean())]
    assert_same(*(again(again(each)) for each in first))


@pytest.mark.usefixtures("rounded_products")
@pytest.mark.parametrize("ignored", [0, 3, 9], ids=["none ignored", "some", "all"])
@pytest.mark.parametrize(
    "names",
    [
        ("lse",),
        ("lse", "sum", "max"),
        ("lse", "sumsq"),
        ("lse@2",),
        ("softplus",),
        ("below_target",),
        ("lse<0.3",),
    ],
    ids="-".join,
)
def test_a_chunk_that_waits_for_backward(names, ignored, monkeypatch):
    """Where products in bfloat16 keep one chunk: as chunks of 4 rows, any number of times."""
    random = torch.Generator().manual_seed(1)
    x, w, b = (torch.randn(*s, generator=random).bfloat16() for s in ((9, 8), (51, 8), (51,)))
    t, scale = torch.tensor(1.3), torch.tensor(0.7)
    factor = torch.rand(9, generator=random)
    y = torch.randint(51, (9,), generator=random)
    y[:ignored] = -100
    kept = []
    sweep = loss_fn.kept_sweep
    monkeypatch.setattr(loss_fn, "kept_sweep", lambda *a: kept.append(1) or sweep(*a))

    def loss(leaves, options=None):
        x, w, b, scale, t, factor = leaves

        def own(s, factor):
            ways = {"lse@2": lambda s: s.lse_at(2), "lse<0.3": lambda s: s.lse_up_to(0.3)}
            terms = [ways[n](s) if n in ways else getattr(s, n) for n in names]
            return factor * (sum(terms) - t * s.target)

        return linear_loss(
            x, w, y, own, names=names, parameters=(t,), row_inputs={"factor": factor},
            linear_bias=b, logit_scale=scale, options=options,
        )  # fmt: skip

    waits = "lse<0.3" not in names and "sumsq" not in names  # no places to round a logit
    for frozen in ((), (0, 4), (1, 5), (0, 1, 2, 3)):
        leaves = [
            v.clone().requires_grad_(i not in frozen)
            for i, v in enumerate((x, w, b, scale, t, factor))
        ]
        wanted = [v for v in leaves if v.requires_grad]
        ours, theirs = loss(leaves), loss(leaves, LinearLossOptions(chunk_rows=4))
        torch.testing.assert_close(ours, theirs)
        expected = gradients(3.1 * theirs, wanted)
        for _ in range(2):  # the chunk is not used up
            for v, mine, other in zip(
                wanted, gradients(3.1 * ours, wanted, retain_graph=True), expected, strict=True
            ):
                assert mine.dtype == v.dtype
                floor = 2.0**-7 if v.dtype == torch.bfloat16 or v is leaves[3] else 2.0**-20
                size = 1 + float(other.double().abs().max())
                torch.testing.assert_close(mine, other, rtol=0, atol=floor * size)
    assert len(kept) == (3 if waits else 0)  # nor where the head wants no gradient
    leaves = [v.clone().requires_grad_() for v in (x, w, b, scale, t, factor)]
    again = loss(leaves)
    again.backward()
    with pytest.raises(RuntimeError, match="second time"):
        again.backward()
    second = loss(leaves)
    first = gradients(second, leaves, create_graph=True)
    found = gradients(sum(g.float().square().sum() for g in first), leaves)
    assert all(g.isfinite().all() for g in found)
    assert bool(found[1].any()) == (ignored < 9)
    changed = loss(leaves)
    with torch.no_grad():
        leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.backward()


def rising(offset):
    """Features, and classes whose last lie far above the others: in a later tile of 2048."""
    random = torch.Generator().manual_seed(2)
    x, w = torch.randn(6, 8, generator=random), torch.randn(4100, 8, generator=random)
    w[-6:] = x / x.norm(dim=1, keepdim=True) ** 2 * offset
    return x.bfloat16(), w.bfloat16()


@pytest.mark.usefixtures("rounded_products")
@pytest.mark.parametrize(
    ("names", "own", "keywords", "offset"),
    [
        (("sumsq",), lambda s: s.moment, {}, 1024),
        (("softplus", "lse"), lambda s: s.softplus, {}, 512),
        (("stable_sum", "lse@0.5"), lambda s: s.stable_sum, {}, 512),
        (("lse@64",), lambda s: s.lse_at(64), {}, 9),
        (("lse@4",), lambda s: s.lse_at(4), {}, 9),
        (("max",), lambda s: s.max, {"softcap": 30.0}, 200),
        (("lse", "entropy"), lambda s: s.entropy, {}, 12),
    ],
    ids=["moment", "softplus-lse", "stable-lse", "hot", "warm", "saturated", "entropy"],
)
def test_logits_that_would_not_bear_rounding(names, own, keywords, offset):
    """Whatever a chunk keeps, its gradients are as exact as with two sweeps, which keep nothing."""
    x, w = (t.requires_grad_() for t in rising(offset))
    w.data[:, 0] += 64 if names == ("sumsq",) else 0  # an offset that a row has in common
    found = [
        gradients(linear_loss(x, w, None, own, names=names, options=options, **keywords), (x, w))
        for options in (None, TWO)
    ]
    exact = linear_loss(
        x.double(), w.double(), None, own, names=names, backend="reference", **keywords
    )
    for ours, theirs, truth in zip(*found, gradients(exact, (x, w)), strict=True):
        off, budget = ((t.double() - truth.double()).norm() for t in (ours, theirs))
        assert off <= 2 * budget + 2.0**-8 * truth.double().norm()


@pytest.mark.usefixtures("rounded_products")
def test_what_waits_is_as_saved_tensors_are(monkeypatch):
    """Hooks may copy it, edits of what it needs are found, and nothing waits for no gradient."""
    x, w = (t.requires_grad_() for t in rising(12))
    a, y = torch.rand(4100), torch.arange(6)

    def loss(**keywords):
        def own(s):
            return s.lse - s.target + s.weighted_sum

        names = ("lse", "target", "weighted_sum")
        return linear_loss(x, w, y, own, names=names, class_vector=a, **keywords)

    expected = gradients(loss(), (x, w))
    for lose in (torch.clone, lambda t: torch.empty(t.shape, dtype=t.dtype).copy_(t)):
        with torch.autograd.graph.saved_tensors_hooks(lose, lambda t: t):
            found = [loss(), linear_cross_entropy(x, w, y)]
        assert_same(gradients(found[0], (x, w)), expected)
        found[1].backward()
    changed = loss()
    a.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.backward()
    t = torch.tensor(0.7, requires_grad=True)
    monkeypatch.delattr(loss_fn, "kept_sweep")
    inputs = (x.detach(), w.detach(), y)
    linear_loss(*inputs, lambda s: t * s.target_minus_lse, parameters=(t,)).backward()
    assert t.grad is not None


@pytest.mark.parametrize("mask", [-1e9, -1e30, -math.inf])
@pytest.mark.parametrize("only", [True, False], ids=["only the target is legal", "it is not"])
def test_variance_beside_logits_that_are_far_away(only, mask, backend):
    """A weight of 0 times an infinite square is 0, and so is its gradient."""
    x, w = (torch.randn(*s, requires_grad=True) for s in ((2, 6), (5, 6)))
    b = torch.full((5,), mask) if only else torch.zeros(5)
    b[0] = 0.0 if only else mask
    s = linear_statistics(
        x, w, torch.tensor([0, -100]), names=("variance",), linear_bias=b, backend=backend
    )
    z = (x[0] @ w.T + b)[slice(0, 1) if only else slice(1, None)]
    expected = (z.softmax(0) * (z - (z.softmax(0) * z).sum()).square()).sum()
    torch.testing.assert_close(s.variance[0], expected)
    assert all(g.isfinite().all() for g in gradients(s.variance[0], (x, w)))


@pytest.mark.usefixtures("rounded_products")
def test_closures_do_not_wait(head):
    """What F closes over is found before anything is kept."""
    t = torch.tensor(0.7, requires_grad=True)
    x, w = (v.detach()[:, :6].bfloat16().requires_grad_() for v in (head.x, head.w))
    loss = linear_loss(x, w, head.target, lambda s: -F.logsigmoid(t * s.target_minus_lse))

    def dense(z):
        odds = at(z, head.ids) - negatives(z, head.ids).logsumexp(1)
        return gradients(-F.logsigmoid(t.to(z.dtype) * odds)[head.counted].mean(), (x, w, t))

    exact, plain = dense(x.double() @ w.double().T), dense((x @ w.T).float())
    for mine, true, theirs in zip(gradients(loss, (x, w, t)), exact, plain, strict=True):
        off, budget = (mine - true).norm(), (theirs - true).norm()
        assert off <= 2 * budget + 2.0**-8 * true.norm()


@SCHEDULES
def test_no_gradient_wanted(options, head, backend):
    with torch.no_grad():
        loss = linear_loss(head.x, head.w, head.target, focal, options=options, backend=backend)
    assert not loss.requires_grad
    assert_same(loss, focal_oracle(head.x @ head.w.T, head.ids)[head.counted].mean().detach())


def test_cross_entropy_is_a_linear_loss(head, backend):
    """The built-in recipe in closed form and the same F through autograd."""
    keywords = {"options": CHUNKS, "backend": backend, **head.keywords()}
    ours = linear_loss(head.x, head.w, head.target, lambda s: -s.log_p, **keywords)
    recipe = linear_cross_entropy(head.x, head.w, head.target, **keywords)
    assert_same(ours, recipe)
    assert_same(gradients(ours, head.leaves), gradients(recipe, head.leaves))


# linear_statistics: what each attribute is, from logits (N, V) and target ids.

ATTRIBUTES = {
    "target": lambda z, y: at(z, y),
    "lse": lambda z, y: negatives(z, y).logsumexp(1),
    "max": lambda z, y: negatives(z, y).amax(1),
    "runner_up": lambda z, y: negatives(z, y).topk(2, 1).values[:, 1],
    "below_target": lambda z, y: z.masked_fill(z >= at(z, y).unsqueeze(1), -torch.inf).amax(1),
    "sum": lambda z, y: z.sum(1),
    "sumsq": lambda z, y: z.square().sum(1),
    "moment": lambda z, y: (z - z.mean(1, keepdim=True)).square().sum(1),
    "softplus": lambda z, y: (
        negatives(F.softplus(z), y).masked_fill(F.one_hot(y, V).bool(), 0.0).sum(1)
    ),
    "stable_sum": lambda z, y: (
        torch.where(z < 0, 1 / (1 - z), 1 + z).masked_fill(F.one_hot(y, V).bool(), 0.0).sum(1)
    ),
    "variance": lambda z, y: (
        (z.softmax(1) * z.square()).sum(1) - (z.softmax(1) * z).sum(1).square()
    ),
    "weighted_sum": lambda z, y: z @ vector(),
    "teacher": lambda z, y: (z * teacher() * vector()).sum(1),
    "target_minus_lse": lambda z, y: at(z, y) - negatives(z, y).logsumexp(1),
    "log_p": lambda z, y: at(z.log_softmax(1), y),
    "log_1mp": lambda z, y: negatives(z, y).logsumexp(1) - z.logsumexp(1),
    "logsumexp": lambda z, y: z.logsumexp(1),
    "entropy": lambda z, y: -(z.softmax(1) * z.log_softmax(1)).sum(1),
}
IDS = {
    "argmax": lambda z, y: negatives(z, y).argmax(1),
    "runner_up_index": lambda z, y: negatives(z, y).topk(2, 1).indices[:, 1],
    "below_target_index": lambda z, y: torch.where(
        at(z, y) == z.amin(1), -1, z.masked_fill(z >= at(z, y).unsqueeze(1), -torch.inf).argmax(1)
    ),
}
INNER = {"shift", "relative_logsumexp"}  # how the others are stored
NAMES = ("target", "lse", "variance", "runner_up", "below_target", "sumsq", "softplus",
         "stable_sum", "weighted_sum", "teacher", "lse@0.5")  # fmt: skip


def vector():
    return torch.linspace(-1, 2, V, dtype=torch.float64)


def teacher():
    draw = torch.Generator().manual_seed(11)
    return torch.rand(N, V, dtype=torch.float64, generator=draw)


def collect(head, backend, names=NAMES, **keywords):
    return linear_statistics(
        head.x, head.w, head.ids, names=names, class_vector=vector(), teacher=teacher(),
        backend=backend, **head.keywords(), **keywords,
    )  # fmt: skip


def test_every_attribute_has_an_oracle():
    properties = {n for n, p in vars(RowStatistics).items() if isinstance(p, property)}
    assert properties == ATTRIBUTES.keys() | IDS.keys() | INNER


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute(name, head, backend):
    found = getattr(collect(head, backend), name)
    expected = ATTRIBUTES[name](head.logits(), head.ids)
    assert_same(found, expected)
    upstream = torch.linspace(-1, 1, N, dtype=torch.float64)
    assert_same(gradients(found, head.leaves, upstream), gradients(expected, head.leaves, upstream))


@pytest.mark.parametrize("name", IDS)
def test_id_attribute(name, head, backend):
    found = getattr(collect(head, backend), name)
    assert found.dtype == torch.int64
    assert not found.requires_grad
    torch.testing.assert_close(found, IDS[name](head.logits(), head.ids))


@pytest.mark.parametrize("name", ["logsumexp", "entropy", "lse", "max"])
def test_attribute_without_target(name, head, backend):
    s = linear_statistics(
        head.x, head.w, names=("entropy", "max"), backend=backend, **head.keywords()
    )
    z = head.logits()
    expected = {
        "logsumexp": z.logsumexp(1),
        "entropy": -(z.softmax(1) * z.log_softmax(1)).sum(1),
        "lse": z.logsumexp(1),
        "max": z.amax(1),
    }[name]
    found = getattr(s, name)
    assert_same(found, expected)
    assert_same(gradients(found.sum(), head.leaves), gradients(expected.sum(), head.leaves))
    assert "target" not in s.values


def test_temperature(head, backend):
    s = collect(head, backend)
    expected = (0.5 * negatives(head.logits(), head.ids)).logsumexp(1)
    assert_same(s.lse_at(0.5), expected)
    wanted = gradients(s.lse_at(0.5).sum(), head.leaves)
    assert_same(wanted, gradients(expected.sum(), head.leaves))
    with pytest.raises(AttributeError, match=r"names=\(\.\.\., 'lse@2'\)"):
        s.lse_at(2)


def test_all_statistics_at_once_is_each_alone(head, backend):
    together = collect(head, backend)
    for name in NAMES:
        alone = collect(head, backend, names=(name,))
        for output, value in alone.values.items():
            torch.testing.assert_close(value, together.values[output], rtol=1e-12, atol=1e-12)


def test_several_targets(head, backend):
    """Distinct ids count once, -1 is padding, and the negatives are all other classes."""
    target = torch.stack([head.ids, (head.ids + 5) % V, head.ids, torch.full((N,), -1)], 1)
    target[0] = torch.tensor([-1, -1, -1, 0])
    s = linear_statistics(
        head.x, head.w, target, names=("lse", "softplus"), backend=backend, **head.keywords()
    )
    z = head.logits()
    mask = torch.zeros(N, V + 1, dtype=torch.bool).scatter(1, target % (V + 1), True)[:, :V]
    assert mask[0].nonzero().tolist() == [[0]]
    once = torch.tensor([[True, True, False, False]]).repeat(N, 1)
    once[0] = torch.tensor([False, False, False, True])
    expected = z.gather(1, target.clamp_min(0)).masked_fill(~once, -torch.inf)
    lse = z.masked_fill(mask, -torch.inf).logsumexp(1)
    assert s.target.shape == (N, 4)
    assert_same(s.target, expected)
    assert_same(s.lse, lse)
    assert_same(s.logsumexp, z.logsumexp(1))
    assert_same(s.log_p, expected - z.logsumexp(1).unsqueeze(1))
    found = (s.lse - torch.where(once, s.target, 0.0).sum(1) + s.softplus).sum()
    oracle = (
        lse - torch.where(once, expected, 0.0).sum(1) + F.softplus(z).masked_fill(mask, 0).sum(1)
    ).sum()
    assert_same(gradients(found, head.leaves), gradients(oracle, head.leaves))
    with pytest.raises(ValueError, match="one target per row, got 4"):
        _ = s.log_1mp


def test_leading_dims(head, backend):
    x, target = head.x[:20].reshape(2, 2, 5, D), head.ids[:20].reshape(2, 2, 5)
    wide = target.unsqueeze(-1).expand(2, 2, 5, 3)
    keywords = {"names": ("entropy", "max"), "backend": backend}
    s = linear_statistics(x, head.w, target, **keywords)
    for t in (s.lse, s.target, s.log_p, s.entropy, s.argmax, s.shift):
        assert t.shape == (2, 2, 5)
    assert linear_statistics(x, head.w, wide, **keywords).target.shape == (2, 2, 5, 3)
    assert linear_statistics(x[0, 0, 0], head.w, target[0, 0, 0], **keywords).log_p.shape == ()
    assert_same(s.log_p.flatten(), linear_statistics(head.x[:20], head.w, head.ids[:20]).log_p)


def test_ignored_rows_have_no_target(head, backend):
    s = linear_statistics(head.x, head.w, head.target, backend=backend, **head.keywords())
    ignored = ~head.counted
    assert (s.target[ignored] == -torch.inf).all()
    assert_same(s.lse[ignored], head.logits().logsumexp(1)[ignored])
    assert_same(s.logsumexp, head.logits().logsumexp(1))
    found = gradients(s.logsumexp.sum(), head.leaves)
    assert_same(found, gradients(head.logits().logsumexp(1).sum(), head.leaves))


def test_statistics_are_twice_differentiable(head, backend):
    x = head.x[:3].detach().requires_grad_()

    def value(x, w):
        s = linear_statistics(
            x, w, head.ids[:3], names=("lse", "entropy", "sumsq", "lse@2"),
            softcap=5.0, backend=backend,
        )  # fmt: skip
        return s.entropy, s.moment, s.log_p.exp(), s.lse_at(2)

    assert torch.autograd.gradgradcheck(value, (x, head.w), fast_mode=True)


# linear_log_prob


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_log_prob_and_entropy(softcap, head, backend):
    log_prob, entropy = linear_log_prob(
        head.x, head.w, head.target, softcap=softcap, entropy=True, backend=backend,
        **head.keywords(),
    )  # fmt: skip
    z = head.logits(softcap)
    expected = at(z.log_softmax(1), head.ids) * head.counted
    expected_entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1) * head.counted
    assert_same(log_prob, expected)
    assert_same(entropy, expected_entropy)
    assert (log_prob[~head.counted] == 0).all()
    assert (entropy[~head.counted] == 0).all()
    a, b = torch.randn(2, N, dtype=torch.float64)
    found = gradients(a @ log_prob + b @ entropy, head.leaves)
    assert_same(found, gradients(a @ expected + b @ expected_entropy, head.leaves))
    alone = linear_log_prob(
        head.x, head.w, head.target, softcap=softcap, backend=backend, **head.keywords()
    )
    assert_same(alone, log_prob)


def test_log_prob_gradcheck(backend):
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 5], [-1, 2]])

    def value(x, w, b, scale):
        return linear_log_prob(
            x, w, target, linear_bias=b, logit_scale=scale, ignore_index=-1, entropy=True,
            backend=backend,
        )  # fmt: skip

    assert value(x, w, b, scale)[0].shape == (2, 2)
    assert torch.autograd.gradcheck(value, (x, w, b, scale), fast_mode=True)


def test_log_prob_of_a_certain_target(backend):
    """log p keeps its digits where softmax gives 1: p = 1 - 2e-30."""
    w = torch.tensor([[1.0], [-1.0], [-1.0]], dtype=torch.float64)
    distance = -math.log(1e-30)
    x = torch.full((1, 1), distance / 2, dtype=torch.float64)
    log_prob = linear_log_prob(x, w, torch.tensor([0]), backend=backend)
    assert log_prob.item() == pytest.approx(-2e-30, rel=1e-12)


def test_policy_gradient(head, backend):
    """GRPO as a trainer writes it: groups of completions, clipped ratio, KL to a reference."""
    groups, length = 4, 5
    x = head.x[:20].reshape(groups, length, D)
    target = head.target[:20].reshape(groups, length)
    mask = target >= 0
    reward = torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    advantage = ((reward - reward.mean()) / reward.std()).unsqueeze(1)
    old = torch.full_like(reward, -3.5).unsqueeze(1)

    def loss(log_prob):
        ratio = (log_prob - old).exp()
        clipped = ratio.clamp(0.8, 1.2)
        kl = (old - log_prob).exp() - (old - log_prob) - 1
        each = -torch.minimum(ratio * advantage, clipped * advantage) + 0.04 * kl
        return ((each * mask).sum(1) / mask.sum(1)).mean()

    ours = loss(linear_log_prob(x, head.w, target, backend=backend))
    z = (x @ head.w.T).log_softmax(-1)
    expected = loss(z.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1) * mask)
    assert_same(ours, expected)
    assert_same(gradients(ours, (x, head.w)), gradients(expected, (x, head.w)))
