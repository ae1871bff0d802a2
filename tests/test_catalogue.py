"""Every loss of the catalogue against its dense definition on stored logits, in float64.

The definitions stand in `lossops_bench.dense`, which the benchmark races too; they are written from
the papers' formulas and use nothing of lossops. One table of recipes, one of definitions: a loss
with a row in each is tested here in full.
"""

from __future__ import annotations

import copy
import doctest
import io
import pickle
from typing import Any

import pytest
import torch
from conftest import DTYPES, FLOOR, assert_no_worse, value_and_gradients
from torch import Tensor, nn

from lossops import LinearLossOptions, catalogue
from lossops.reference import accumulate_dtype
from lossops_bench.dense import DENSE, Dense, Draw

RECIPES = catalogue.RECIPES
EVERY = pytest.mark.parametrize("name", RECIPES)
# Of one loss a row, over logits z and targets y: what `linear_loss` promises holds for them.
ROWS = pytest.mark.parametrize(
    "name",
    [
        name
        for name, row in DENSE.items()
        if "target" in RECIPES[name].positional and not row.whole and not row.of_features
    ],
)
VARIANTS = [
    pytest.param(name, i, id=f"{name}-{i}" if i else name)
    for name, row in DENSE.items()
    for i in range(len(row.variants))
]
# 37 classes: more than a vector of lanes, no multiple of one. Eleven rows: chunks of four leave a
# last one of three. Rows run from hopeless to certain.
CLASSES, FEATURES = 37, 7
CHUNKS = LinearLossOptions(chunk_rows=4)


class Case:
    """Seeded inputs of one loss in a dtype, and the calls of both sides."""

    def __init__(
        self,
        name: str,
        variant: int = 0,
        dtype: torch.dtype = torch.float64,
        *,
        classes: int = CLASSES,
        rows: int | None = None,
        factor: float = 1.0,
    ) -> None:
        self.row: Dense = DENSE[name]
        self.face = RECIPES[name].face
        self.own = dict(self.row.variants[variant])
        lead = self.row.lead if rows is None else (rows, *self.row.lead[1:])
        draw = Draw(lead, classes, FEATURES, dtype, torch.Generator().manual_seed(5))
        w = draw.normal(classes, FEATURES)
        self.y = draw.ids(classes, *lead)
        pull = torch.linspace(-0.3, 1.2, max(1, self.y.numel()), dtype=dtype)
        x = 0.5 * draw.normal(*lead, FEATURES)
        x += pull[: self.y.numel()].reshape(*lead, 1) * w[self.y]
        self.leaves: tuple[Tensor, ...] = (factor * x, w)
        if self.row.leaves:
            self.leaves = tuple(factor * t for t in self.row.leaves(draw))
        if factor != 1:  # on a grid, so that float32 has the same logits as float64
            self.leaves = tuple((16 * t).round() / 16 for t in self.leaves)
        self.extras = self.row.extras(draw) if self.row.extras else {}
        self.targets = (self.y,) if "target" in RECIPES[name].positional else ()

    def double(self) -> Case:
        """The same numbers in float64."""
        other = copy.copy(self)
        other.leaves = tuple(t.double() for t in self.leaves)
        other.extras = {n: _double(t) for n, t in self.extras.items()}
        return other

    def ours(self, *leaves: Tensor, **keywords: Any) -> Tensor:
        return self.face(*leaves, *self.targets, **self.own, **self.extras, **keywords)

    def plain(self, *leaves: Tensor) -> Tensor:
        """The mean loss; logits in the dtype of x, then upcast."""
        if self.row.of_features:
            found = self.row.losses(*leaves, *self.targets, **self.own, **self.extras)
        else:
            x, w = leaves
            z = (x @ w.T).to(accumulate_dtype(x.dtype))
            found = self.row.losses(z, self.y, **self.own, **self._upcast())
        return found if found.ndim == 0 else found.mean()

    def _upcast(self) -> dict[str, Any]:
        return {
            n: t.to(accumulate_dtype(t.dtype)) if _floating(t) else t
            for n, t in self.extras.items()
        }


def _floating(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _double(t: Any) -> Any:
    if isinstance(t, tuple):
        return tuple(_double(each) for each in t)
    return t.double() if _floating(t) else t


def assert_same(found: Any, expected: Any) -> None:
    """Equal to the rounding of float64."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_every_recipe_has_a_dense_definition() -> None:
    assert RECIPES.keys() == DENSE.keys()


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
@pytest.mark.parametrize("kind", ["f64", "f32", "bf16"])
def test_value_and_gradients(name: str, variant: int, kind: str, backend: str) -> None:
    case = Case(name, variant, DTYPES[kind])
    ours = value_and_gradients(lambda *t: case.ours(*t, backend=backend), case.leaves)
    exact = case.double()
    oracle = value_and_gradients(exact.plain, exact.leaves)
    assert ours[0].dtype == accumulate_dtype(DTYPES[kind])
    if kind == "f64":
        assert_same(ours, oracle)
        return
    plain = value_and_gradients(case.plain, case.leaves)
    for what, a, b, c in zip(("loss", "dx", "dw"), ours, plain, oracle, strict=False):
        assert_no_worse(f"{name} {what}", a, b, c)


@ROWS
def test_head_keywords_and_schedules(name: str, backend: str) -> None:
    """Bias, scale, softcap, weights and ignored rows, as many as the face takes; chunks of rows."""
    case, head, row = Case(name), RECIPES[name].head, DENSE[name]
    draw = torch.Generator().manual_seed(6)
    (x, w), y = case.leaves, case.y.clone()
    y[[2, 7]] = -100
    counted, ids = y != -100, y.clamp_min(0)
    b = torch.randn(CLASSES, generator=draw, dtype=x.dtype)
    scale, softcap = torch.tensor(0.7, dtype=x.dtype), 4.0
    weight = torch.rand(CLASSES, generator=draw, dtype=x.dtype) + 0.5
    rows = torch.rand(len(x), generator=draw, dtype=x.dtype) + 0.5
    case.targets = (y,)
    given = {"weight": weight, "sample_weight": rows, "softcap": softcap, "options": CHUNKS}
    given = {n: v for n, v in given.items() if n in head}
    if not row.weighted:
        given = {n: v for n, v in given.items() if "weight" not in n}

    def ours(x: Tensor, w: Tensor, b: Tensor, scale: Tensor, **more: Any) -> Tensor:
        shaping = {"linear_bias": b, "logit_scale": scale}
        shaping = {n: v for n, v in shaping.items() if n in head}
        return case.ours(x, w, backend=backend, **shaping, **given, **more)

    def plain(x: Tensor, w: Tensor, b: Tensor, scale: Tensor, reduced: bool = True) -> Tensor:
        z = x @ w.T
        z = scale * z if "logit_scale" in head else z + 0 * scale
        z = z + b if "linear_bias" in head else z + 0 * b
        z = softcap * torch.tanh(z / softcap) if "softcap" in given else z
        extras = {n: t[counted] if t.shape[:1] == y.shape else t for n, t in case.extras.items()}
        losses = row.losses(z[counted], ids[counted], **case.own, **extras)
        u = torch.ones_like(losses)
        if "weight" in given:
            u = u * weight[ids[counted]]
        if "sample_weight" in given:
            u = u * rows[counted]
        total = (u * losses).sum()
        return total / u.sum() if reduced else total

    inputs = (x, w, b, scale)
    used = [True, True, "linear_bias" in head, "logit_scale" in head]

    def of(function: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_(u) for t, u in zip(inputs, used, strict=True)]
        value = function(*leaves)
        wanted = [t for t in leaves if t.requires_grad]
        return [value.detach(), *torch.autograd.grad(value, wanted)]

    assert_same(of(ours), of(plain))
    given.pop("options", None)
    if row.weighted:
        each = ours(*inputs, reduction="none")
        assert each.shape == y.shape
        assert (each[~counted] == 0).all()
        assert_same(of(lambda *t: ours(*t, reduction="none").sum()),
                    of(lambda *t: plain(*t, reduced=False)))  # fmt: skip


@ROWS
def test_nothing_counted_is_zero(name: str, backend: str) -> None:
    for rows in (5, 0):
        case = Case(name, rows=rows)
        case.targets = (torch.full_like(case.y, -100),)
        found = value_and_gradients(lambda *t, c=case: c.ours(*t, backend=backend), case.leaves)
        assert not any(t.any() for t in found)


@pytest.mark.parametrize("name", [n for n, row in DENSE.items() if row.least_classes == 1])
def test_one_class(name: str, backend: str) -> None:
    """As the definition where that is a number, 0 where it is 0 / 0 or lacks any rival."""
    case = Case(name, classes=1)
    ours = value_and_gradients(lambda *t: case.ours(*t, backend=backend), case.leaves)
    plain = value_and_gradients(case.plain, case.leaves)
    for a, b in zip(ours, plain, strict=True):
        known = b.isfinite()
        assert not a.isnan().any()
        torch.testing.assert_close(a[known], b[known], rtol=1e-9, atol=1e-11)


@EVERY
def test_huge_logits(name: str, backend: str) -> None:
    """Logits of some thousands in float32: no NaN where the float64 definition has none."""
    case = Case(name, dtype=torch.float32, factor=300.0)
    ours = value_and_gradients(lambda *t: case.ours(*t, backend=backend), case.leaves)
    exact = case.double()
    oracle = value_and_gradients(exact.plain, exact.leaves)
    plain = value_and_gradients(case.plain, case.leaves)
    for what, a, b, c in zip(("loss", "dx", "dw"), ours, plain, oracle, strict=False):
        if c.isfinite().all() and float(c.abs().max()) < 1e37:
            assert a.isfinite().all(), f"{name} {what}"
            if b.isfinite().all():
                # The definition itself is no better than 1e-15 of 1 - p in float64; and a gradient
                # may be what is left of entries of full size, dz = 1 / N, that cancel.
                whole = max(float(t.abs().max()) for t in case.leaves) / max(1, case.y.numel())
                size = float(c.abs().max()) + (0.0 if what == "loss" else whole)
                floor = FLOOR[a.dtype] * size + 1e-12
                assert_no_worse(f"{name} {what}", a, b, c, floor=floor)


@ROWS
@pytest.mark.parametrize("level", [-12.0, 12.0])
def test_rows_that_are_all_hopeless_or_certain(name: str, level: float, backend: str) -> None:
    """Other rows would hide theirs: what is lost in a gradient that is small for each of them."""
    case = Case(name, dtype=torch.float32)
    x, w, *rest = case.leaves
    own = w[case.y]
    away = level - (x * own).sum(-1, keepdim=True)
    case.leaves = (x + away * own / own.square().sum(-1, keepdim=True), w, *rest)
    ours = value_and_gradients(lambda *t: case.ours(*t, backend=backend), case.leaves)
    exact = case.double()
    oracle = value_and_gradients(exact.plain, exact.leaves)
    plain = value_and_gradients(case.plain, case.leaves)
    for what, a, b, c in zip(("loss", "dx", "dw"), ours, plain, oracle, strict=False):
        # e^z has the relative error that z has units in its last place.
        floor = abs(level) * FLOOR[a.dtype] * float(c.abs().max())
        assert_no_worse(f"{name} {what}", a, b, c, floor=floor)


# Values at z = [2, -1, 0.5, 3, -2.5, 0], y = 0, of the authors' modules where they exist.
Z = (2.0, -1.0, 0.5, 3.0, -2.5, 0.0)
ANCHORS: dict[str, tuple[dict[str, Any], float, tuple[float, ...]]] = {
    "comp_sum": ({}, 1.42012638, (-0.758317, 0.012033, 0.053927, 0.656964, 0.002685, 0.032708)),
    "generalized_cross_entropy": (
        {}, 0.89991341, (-0.280623, 0.004453, 0.019956, 0.243116, 0.000994, 0.012104),
    ),
    "normalized_cross_entropy": (
        {}, 0.07667755, (-0.042808, 0.004491, 0.005712, 0.023293, 0.004218, 0.005094),
    ),
    "reverse_cross_entropy": (
        {}, 6.98435345, (-1.688003, 0.026785, 0.120041, 1.462393, 0.005976, 0.072808),
    ),
    "normalized_generalized_cross_entropy": (
        {}, 0.13686002, (-0.042004, 0.001270, 0.004162, 0.033379, 0.000403, 0.002789),
    ),
    "dual_focal": (
        {"gamma": 5.0}, 0.50206270, (-0.874792, 0.011236, 0.217024, 0.613481, 0.002507, 0.030543),
    ),
    "encouraging": ({}, 1.14347199, (-1, 0.015868, 0.071114, 0.866345, 0.003541, 0.043133)),
    "encouraging, a decoupled row": (
        {"log_end": 1.0}, 1.14347199, (-1, 0.015868, 0.071114, 0.866345, 0.003541, 0.043133),
    ),
    "poly": ({}, 2.17844291, (-0.941589, 0.014941, 0.066960, 0.815741, 0.003334, 0.040613)),
    "max_sup": ({}, 1.68679305, (-0.774983, -0.004634, 0.037260, 0.740297, -0.013982, 0.016042)),
    "squentropy": (
        {}, 4.72012638, (-0.758317, -0.387967, 0.253927, 1.856964, -0.997315, 0.032708),
    ),
    "brier": ({}, 1.01077531, (-0.488575, -0.005786, -0.021412, 0.531490, -0.001341, -0.014375)),
    "one_vs_rest": (
        {}, 5.23489095, (-0.119203, 0.268941, 0.622459, 0.952574, 0.075858, 0.5),
    ),
    "normalized_focal": (
        {}, 0.06873272, (-0.038366, 0.004131, 0.005212, 0.020468, 0.003889, 0.004665),
    ),
    "single_label_asymmetric": (
        {}, 1.30308735, (-0.695635, 0.011005, 0.049320, 0.602940, 0.002455, 0.029914),
    ),
    "stable_max": (
        {}, 1.23214368, (-0.236111, 0.024306, 0.097222, 0.097222, 0.007937, 0.097222),
    ),
    "logit_clip": (
        {}, 1.50268158, (-0.150962, 0.014961, 0.040477, 0.092425, -0.007748, 0.031599),
    ),
    "ldr": (
        {"margin": 1.0, "lam": 2.0}, -0.12188407,
        (-0.822860, 0.065166, 0.137956, 0.481515, 0.030782, 0.107441),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ANCHORS)
def test_anchor(name: str, backend: str) -> None:
    own, loss, gradient = ANCHORS[name]
    z = torch.tensor([Z], dtype=torch.float64)
    w, y = torch.eye(6, dtype=torch.float64), torch.tensor([0])
    face = RECIPES[name.partition(",")[0]].face
    found, dz = value_and_gradients(lambda x: face(x, w, y, **own, backend=backend), (z,))
    # The authors' labels are float32, and so is their log 1e-4: 1.3e-7 off.
    assert float(found) == pytest.approx(loss, abs=1.2e-7 if "reverse" in name else 6e-9)
    torch.testing.assert_close(dz[0], z.new_tensor(gradient), rtol=0, atol=6e-7)


def test_anchors_of_entropy_and_error_norm(backend: str) -> None:
    """Entropy 0.95764952, from a penalty on it; error norm 1.00537322, from where rows drop out."""
    z, w = torch.tensor([Z], dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    y, own = torch.tensor([0]), {"backend": backend}
    confident = catalogue.linear_confidence_penalty_loss(z, w, y, beta=1.0, **own)
    assert 1.42012638 - float(confident) == pytest.approx(0.95764952, abs=1.2e-8)
    kept = [
        float(catalogue.linear_error_norm_truncation_loss(z, w, y, threshold=1.00537322 + d, **own))
        for d in (-6e-9, 6e-9)
    ]
    assert kept == [0.0, pytest.approx(1.42012638, abs=6e-9)]


# Cosines 0.6, -0.2, 0.1, 0.75, -0.5, 0 of the classes, y = 0, scale 4.
COSINES = (0.6, -0.2, 0.1, 0.75, -0.5, 0.0)
MARGINS: dict[str, tuple[str, dict[str, Any], float, tuple[float, ...]]] = {
    "CosFace": (
        "cos_face", {"margin": 0.4}, 2.43425956,
        (-3.649349, 0.070795, 0.235048, 3.164626, 0.021323, 0.157557),
    ),
    "CosFace, filtered": (
        "cos_face", {"margin": 0.4, "filter_above": 0.4}, 1.04087178,
        (-2.587413, 0.285196, 0.946885, 0.0, 0.085899, 0.634716),
    ),
    "ArcFace": (
        "arc_face", {"margin": 0.5}, 2.64419180,
        (-4.596945, 0.072083, 0.239325, 3.222206, 0.021711, 0.160424),
    ),
    "ArcFace, straight through": (
        "arc_face", {"margin": 0.5, "straight_through": True}, 2.64419180,
        (-3.715749, 0.072083, 0.239325, 3.222206, 0.021711, 0.160424),
    ),
}  # fmt: skip


@pytest.mark.parametrize("margin", MARGINS)
def test_anchor_of_a_margin(margin: str, backend: str) -> None:
    """Unit vectors w_j = c_j e_0 + sin_j e_{j+1} have these cosines with e_0."""
    name, own, loss, gradient = MARGINS[margin]
    c = torch.tensor(COSINES, dtype=torch.float64)
    w = torch.cat([c.unsqueeze(1), torch.diag((1 - c.square()).sqrt())], 1)
    x, y = torch.eye(7, dtype=torch.float64)[:1], torch.tensor([0])
    face = RECIPES[name].face
    found, dw = value_and_gradients(
        lambda w: face(x, w, y, scale=4.0, **own, backend=backend), (w,)
    )
    dc = dw[:, 0] / (1 - c.square())  # dw_j = dc_j (x - c_j w_j)
    assert float(found) == pytest.approx(loss, abs=6e-9)
    torch.testing.assert_close(dc, c.new_tensor(gradient), rtol=0, atol=1e-6)


LEARNED = {
    "comp_sum": "tau", "focal": "gamma", "poly": "epsilon", "squentropy": "rescale",
    "active_passive": "alpha", "max_sup": "lam", "generalized_cross_entropy": "q",
}  # fmt: skip


@pytest.mark.parametrize(("name", "argument"), LEARNED.items())
def test_gradient_of_a_learnable_parameter(name: str, argument: str, backend: str) -> None:
    case = Case(name)
    value = torch.tensor(float(case.own.pop(argument)), dtype=torch.float64)

    def ours(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return case.ours(x, w, **{argument: t}, options=CHUNKS, backend=backend)

    def plain(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return case.row.losses(x @ w.T, case.y, **case.own, **{argument: t}).mean()

    inputs = (*case.leaves, value)
    assert_same(value_and_gradients(ours, inputs), value_and_gradients(plain, inputs))


MODULES = [name for name, recipe in RECIPES.items() if recipe.module]


@pytest.mark.parametrize("name", MODULES)
def test_module_is_its_function_with_a_weight(name: str) -> None:
    case, module = Case(name), RECIPES[name].module
    assert module is not None
    assert getattr(catalogue, module.__name__) is module
    biased = "linear_bias" in RECIPES[name].head
    made = module(FEATURES, CLASSES, dtype=torch.float64, **({"bias": True} if biased else {}),
                  **case.own)  # fmt: skip
    bias = {"linear_bias": made.linear_bias} if biased else {}
    x = case.leaves[0]
    found = made(x, *case.targets, **case.extras)
    again = pickle.loads(pickle.dumps(made))
    assert_same(again(x, *case.targets, **case.extras), found)
    assert_same(found, case.ours(x, made.linear_weight, **bias))
    assert f"in_features={FEATURES}" in repr(made)


def test_module_whose_tensors_are_shared_or_parametrized() -> None:
    """One tensor for two options is both; of a parametrized one the value counts."""
    t, x, y = nn.Parameter(torch.tensor(1.5)), torch.randn(4, FEATURES), torch.arange(4)
    module = catalogue.LinearPolyFocalLoss(FEATURES, CLASSES, epsilon=t, logit_scale=t)

    def expected(value: Tensor) -> Tensor:
        return catalogue.linear_poly_focal_loss(
            x, module.linear_weight, y, epsilon=value, logit_scale=t
        )

    assert torch.equal(module(x, y), expected(t))
    module = catalogue.LinearPolyFocalLoss(FEATURES, CLASSES, epsilon=t, logit_scale=1.5)
    nn.utils.parametrize.register_parametrization(module.tensors, "epsilon", nn.Softplus())
    assert torch.equal(module(x, y), expected(nn.functional.softplus(t)))


def test_module_learns_its_own_parameter_and_keeps_its_tensors() -> None:
    gamma = nn.Parameter(torch.tensor(2.0))
    module = catalogue.LinearFocalLoss(FEATURES, CLASSES, gamma=gamma, weight=torch.ones(CLASSES))
    assert {n for n, _ in module.named_parameters()} == {"linear_weight", "tensors.gamma"}
    assert dict(module.named_buffers()).keys() == {"tensors.weight"}
    module(torch.randn(3, FEATURES), torch.tensor([1, 2, 3])).backward()
    assert gamma.grad is not None


@EVERY
def test_example_of_the_docstring(name: str) -> None:
    face = RECIPES[name].face
    parsed = doctest.DocTestParser().get_doctest(face.__doc__, {}, name, None, None)
    assert parsed.examples
    said = io.StringIO()
    doctest.DocTestRunner(verbose=False).run(parsed, out=said.write)
    assert not said.getvalue(), said.getvalue()


def test_arguments_that_do_not_fit() -> None:
    x, w, y = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([1, 2])
    with pytest.raises(
        TypeError, match=r"linear_focal_loss\(\) has no keyword 'gama'; it has gamma"
    ):
        catalogue.linear_focal_loss(x, w, y, gama=1.0)
    with pytest.raises(TypeError, match=r"linear_focal_loss\(\) needs target, got none"):
        catalogue.linear_focal_loss(x, w)
    with pytest.raises(TypeError, match="takes 3 positional arguments, got 4"):
        catalogue.linear_focal_loss(x, w, y, 2.0)
    with pytest.raises(TypeError, match=r"linear_dual_focal_loss\(\) needs gamma, got none"):
        catalogue.linear_dual_focal_loss(x, w, y)
    with pytest.raises(ValueError, match="gamma must be at least 0 and finite, got -1"):
        catalogue.linear_focal_loss(x, w, y, gamma=-1.0)
    with pytest.raises(
        ValueError, match=r"gamma must be one number for all rows, got shape \(2,\)"
    ):
        catalogue.linear_focal_loss(x, w, y, gamma=torch.ones(2))
    with pytest.raises(ValueError, match="lam must be a number, it is not differentiated, got a"):
        catalogue.linear_ldr_loss(x, w, y, lam=torch.ones((), requires_grad=True))
    learned = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="threshold must be a number, it is not differentiated"):
        catalogue.linear_error_norm_truncation_loss(x, w, y, threshold=learned)
    assert catalogue.linear_ldr_loss(x, w, y, lam=torch.ones(())) == catalogue.linear_ldr_loss(
        x, w, y
    )
    assert catalogue.linear_focal_loss(input=x, linear_weight=w, target=y) > 0
