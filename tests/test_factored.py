"""The factored head against `torch.optim.SGD` on the dense weight."""

import copy
import math
import warnings
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import lossops
from lossops import class_table, factored, factors

RATES = {"z": 0.3, "mse": 2e-3, "taylor": 0.05, "spherical": 0.02}
EVERY_LOSS = pytest.mark.parametrize("loss", RATES)


def zipf(shape, v):
    """Ids by falling frequency 1 / (id + 1), as words come."""
    return ((math.log(v + 1) * torch.rand(shape, dtype=torch.float64)).exp().long() - 1).clamp(
        max=v - 1
    )


class Pair:
    """A factored head, and the same weight dense under torch's own SGD."""

    def __init__(self, dim, classes, lr, *, momentum=0.0, weight_decay=0.0, seed=0, **options):
        torch.manual_seed(seed)
        torch.set_num_threads(1)  # small matrices
        self.lr, self.classes = lr, classes
        options.setdefault("dtype", torch.float64)
        self.head = lossops.FactoredSphericalHead(
            dim, classes, momentum=momentum, weight_decay=weight_decay, **options
        )
        self.dense = nn.Linear(dim, classes, bias=self.head.bias, dtype=torch.float64)
        self.dense.load_state_dict(self.head.linear_state_dict())
        self.sgd = torch.optim.SGD(
            self.dense.parameters(), lr, momentum=momentum, weight_decay=weight_decay
        )

    def losses(self, x, y, **options):
        """Both losses, and both gradients of x, after both backwards."""
        ours = x.detach().to(self.head.watched.dtype, copy=True).requires_grad_()
        theirs = x.detach().clone().requires_grad_()
        loss = self.head(ours, y, **options)
        expected = lossops.linear_spherical_loss(
            theirs, self.dense.weight, y, self.head.loss_fn, linear_bias=self.dense.bias,
            mode="gram", **options,
        )  # fmt: skip
        loss.backward()
        expected.backward()
        return loss.detach(), expected.detach(), ours.grad, theirs.grad

    def step(self, lr=None):
        self.head.step(lr or self.lr)
        self.sgd.param_groups[0]["lr"] = lr or self.lr
        self.sgd.step()
        self.sgd.zero_grad()

    def train(self, steps, batch, *, spread=1.0):
        for _ in range(steps):
            x = spread * torch.randn(batch, self.head.dim, dtype=torch.float64)
            found = self.losses(x, zipf((batch,), self.classes))
            self.step()
        return found

    def error(self):
        """Relative distance of the two weights."""
        state = self.head.linear_state_dict()
        pairs = [(state[name].double(), p) for name, p in self.dense.named_parameters()]
        off = sum((a - b).square().sum() for a, b in pairs)
        return float((off / sum(b.square().sum() for _, b in pairs)).detach().sqrt())


@EVERY_LOSS
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0, 0), (0.9, 0), (0, 1e-2), (0.9, 1e-2)])
def test_iterates_are_those_of_sgd(loss, momentum, weight_decay):
    rate = RATES[loss] * (1 - momentum)
    pair = Pair(32, 2000, rate, loss=loss, momentum=momentum, weight_decay=weight_decay)
    value, expected, dx, wanted = pair.train(200, 8)
    assert pair.error() <= 1e-11
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(dx, wanted, rtol=1e-9, atol=1e-13)
    drift = pair.head.check()
    assert drift.gram <= 1e-12
    assert drift.inverse <= 1e-12


@pytest.mark.parametrize("steps", [1000, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("loss", ["z", "mse"])
def test_float32_stays_close_for_thousands_of_steps(loss, steps):
    """With a learning rate that ends epochs; the oracle is dense and float64."""
    options = {"loss": loss, "a": 1.0, "b": 2.0, "dtype": torch.float32}
    pair = Pair(8, 100, {"z": 2.0, "mse": 0.02}[loss], **options)
    pair.train(steps, 4)
    assert pair.head.epochs
    assert pair.head.check().gram <= 1e-4
    assert pair.error() <= 1e-4


def test_without_stabilisation_squared_error_loses_its_digits():
    """What the epochs are for: the same run without them."""
    options = {"loss": "mse", "dtype": torch.float32, "stabilize": False}
    pair = Pair(8, 100, 0.02, **options)
    pair.train(1000, 4)
    assert not pair.error() <= 1e-2


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_bias_several_targets_and_ignored_rows(momentum):
    pair = Pair(5, 40, 0.1, bias=True, momentum=momentum, weight_decay=1e-2)
    for _ in range(30):
        x = torch.randn(9, 5, dtype=torch.float64)
        y = torch.randint(40, (9, 3))
        y[2], y[3, 1:], y[4, 1] = -1, -1, y[4, 0]
        weight = torch.rand(9)
        value, expected, dx, wanted = pair.losses(x, y, sample_weight=weight, reduction="sum")
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(dx, wanted, rtol=1e-10, atol=1e-14)
        pair.step()
    assert pair.error() <= 1e-12


def test_backwards_add_up_and_a_schedule_changes_the_rate():
    pair = Pair(6, 50, 0.1, momentum=0.5)
    for step in range(20):
        for rows in (4, 7, 1):
            targets = zipf((rows,), 50) if rows != 7 else zipf((rows, 2), 50)
            pair.losses(torch.randn(rows, 6, dtype=torch.float64), targets)
        pair.step(lr=0.1 / (1 + step))
    assert pair.error() <= 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_epochs_that_end_in_every_step(momentum, monkeypatch):
    """Rows of many epochs in one batch, table full, rewritten, and again."""
    monkeypatch.setattr(factored, "WATCH_STEPS", 1)
    monkeypatch.setattr(factored, "RANGE", 1.0)
    monkeypatch.setattr(factored, "MOMENTUM_RANGE", 1.0)
    pair = Pair(6, 300, 0.3, momentum=momentum)
    seen = set()
    for _ in range(43):
        pair.train(1, 8)
        seen.add(pair.head.table.live)
    assert seen == set(range(len(pair.head.table.transforms) + 1)), (
        "an epoch per step, up to all of them"
    )
    assert pair.error() <= 1e-12
    ids = torch.arange(300)
    head, table = pair.head, pair.head.table
    assert len(table.epoch.unique()) > 2
    here = table.current(ids)
    there = table.current_without_sync(table.rows[ids], table.epoch[ids])
    torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(head.rows(ids), pair.dense.weight.detach(), rtol=1e-10, atol=1e-12)


def test_refactoring_changes_nothing():
    pair = Pair(6, 50, 0.2, momentum=0.9)
    pair.train(10, 8)
    pair.head.refactor()
    assert pair.head.check().inverse == 0
    assert pair.error() <= 1e-14
    pair.train(10, 8)
    assert pair.error() <= 1e-13


def test_a_lost_condition_is_said():
    """A rate at which squared error overshoots by orders of magnitude in one step."""
    head = lossops.FactoredSphericalHead(4, 100, loss="mse")
    x = torch.eye(4)

    def train():
        for _ in range(factored.WATCH_STEPS):
            head(x, torch.arange(4), reduction="sum").backward()
            head.step(0.45)

    with pytest.warns(RuntimeWarning, match="digits of the weight are lost; lower the learning"):
        train()


@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.3])
def test_little_momentum_forgets_fast(momentum):
    """It shrinks half of U by a hundred in a step: looks come as often as that needs."""
    pair = Pair(8, 100, 0.2, momentum=momentum, dtype=torch.float32)
    pair.train(60, 8)
    assert pair.error() <= 1e-5


def test_a_direction_that_comes_up_late_is_seen():
    """Features along one axis for long: the watch must not have forgotten the others."""
    pair = Pair(4, 100, 0.05, loss="mse", dtype=torch.float32)
    for axis, steps in ((0, 200), (1, 400)):
        for _ in range(steps):
            x = torch.zeros(4, 4, dtype=torch.float64)
            x[:, axis] = 1
            pair.losses(x, zipf((4,), 100))
            pair.step()
    assert pair.error() <= 1e-4


def test_a_head_that_diverged_can_be_loaded_again():
    head = lossops.FactoredSphericalHead(4, 50)
    weight = head.dense()
    head.watched.fill_(math.nan)
    head.load_dense(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 * factored.WATCH_STEPS):
            head(torch.randn(4, 4), torch.arange(4)).backward()
            head.step(0.01)


def test_only_backward_leaves_a_gradient():
    """As for a Parameter: torch.autograd.grad and backward(inputs=...) do not touch the head."""
    head = lossops.FactoredSphericalHead(4, 50)
    x = torch.randn(3, 4, requires_grad=True)
    torch.autograd.grad(head(x, torch.arange(3)), x)
    head(x, torch.arange(3)).backward(inputs=[x])
    assert not head.grad_norm()
    loss = head(x, torch.arange(3))
    loss.backward(retain_graph=True)
    norm = head.grad_norm()
    assert norm > 0
    loss.backward()
    torch.testing.assert_close(head.grad_norm(), 2 * norm)
    copy.deepcopy(head)


def test_ignored_rows_may_hold_anything():
    head = lossops.FactoredSphericalHead(4, 50)
    x = torch.randn(3, 4)
    x[1] = math.nan
    loss = head(x, torch.tensor([1, -100, 2]))
    loss.backward()
    head.step(0.1)
    assert loss.isfinite()
    assert head.dense().isfinite().all()


def test_autocast_does_not_round_the_weight():
    head = lossops.FactoredSphericalHead(4, 50)
    head(torch.randn(8, 4), torch.arange(8)).backward()
    head.step(0.5)
    before = head.dense()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.dense(), before)
        head.refactor()
    torch.testing.assert_close(head.dense(), before, rtol=1e-6, atol=1e-7)


def test_a_gradient_that_waits_is_not_lost():
    head = lossops.FactoredSphericalHead(4, 50)
    head(torch.randn(8, 4), torch.arange(8)).backward()
    with pytest.raises(RuntimeError, match=r"step\(\) first"):
        head.refactor()


def test_a_quiet_run_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pair(8, 100, 0.1).train(50, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_resumes_bit_for_bit(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(factored, "RANGE", 1.02)  # so that epochs end
    head = lossops.FactoredSphericalHead(6, 80, momentum=0.9, dtype=dtype)
    monkeypatch.setattr(factored, "MOMENTUM_RANGE", 4.0)

    def train(head, steps, seed):
        torch.manual_seed(seed)
        for _ in range(steps):
            head(torch.randn(8, 6, dtype=dtype), zipf((8,), 80)).backward()
            head.step(0.2)

    train(head, 30, seed=1)
    assert head.table.live
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = lossops.FactoredSphericalHead(6, 80, momentum=0.9, dtype=dtype)
    other.load_state_dict(torch.load(tmp_path / "head.pt"))
    for each in (head, other):
        train(each, 30, seed=2)
    for name, tensor in head.state_dict().items():
        if not name.endswith("_extra_state"):
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_into_and_out_of_a_linear_layer():
    linear = nn.Linear(6, 30)
    head = lossops.FactoredSphericalHead(6, 30, bias=True)
    head.load_dense(linear.weight, linear.bias)
    other = nn.Linear(6, 30)
    other.load_state_dict(head.linear_state_dict())
    assert torch.equal(other.weight, linear.weight)
    assert torch.equal(other.bias, linear.bias)
    assert torch.equal(head.dense(), linear.weight)
    out = torch.empty(30, 6)
    assert head.dense(out) is out
    assert torch.equal(out, linear.weight)


@pytest.mark.parametrize("bias", [False, True])
def test_largest_logits(bias, monkeypatch):
    monkeypatch.setattr(class_table, "BLOCK", 16)
    monkeypatch.setattr(factored, "RANGE", 1.01)
    pair = Pair(6, 50, 0.5, bias=bias)
    pair.train(30, 8)
    assert pair.head.table.live
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    values, ids = pair.head.topk(x, 7)
    expected = torch.topk(pair.dense(x), 7)
    torch.testing.assert_close(values, expected.values.detach())
    assert torch.equal(ids, expected.indices)
    assert pair.head.topk(x, 90).values.shape == (2, 3, 50)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_norm_and_clipping_are_those_of_the_dense_gradient(momentum):
    pair = Pair(6, 50, 0.5, bias=True, momentum=momentum)
    body = nn.Linear(3, 6, dtype=torch.float64)
    twin = copy.deepcopy(body)
    for _ in range(5):
        x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(50, (8, 2))
        pair.head(body(x), y).backward()
        lossops.linear_spherical_loss(
            twin(x), pair.dense.weight, y, pair.head.loss_fn, linear_bias=pair.dense.bias
        ).backward()
        dense = list(pair.dense.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in dense])
        torch.testing.assert_close(pair.head.grad_norm(), norm, rtol=1e-10, atol=0)
        found = lossops.optim.clip_grad_norm_([*body.parameters(), pair.head], 0.1)
        expected = nn.utils.clip_grad_norm_([*twin.parameters(), *dense], 0.1)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(body.weight.grad, twin.weight.grad)
        pair.step()
        for part in (body, twin):
            part.zero_grad()
    assert pair.error() <= 1e-12


def test_an_ordinary_training_loop():
    """Optimizer, scheduler, zero_grad; half precision features under autocast."""
    pair = Pair(6, 50, 1.0, dtype=torch.float32)
    head = pair.head
    optimizer = lossops.optim.FactoredSGD(head, lr=0.4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    rates = []
    for _ in range(7):
        x, y = torch.randn(8, 6, dtype=torch.float64), zipf((8,), 50)
        head(x, y).backward()
        optimizer.zero_grad()  # this one does not count
        pair.losses(x, y)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        pair.sgd.param_groups[0]["lr"] = rates[-1]
        pair.sgd.step()
        pair.sgd.zero_grad()
        schedule.step()
    assert rates == [0.4] * 3 + [0.2] * 3 + [0.1]
    assert pair.error() <= 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(8, 6, dtype=torch.bfloat16, requires_grad=True)
        loss = head(x, zipf((8,), 50))
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16


def test_nothing_to_learn_from_changes_nothing():
    pair = Pair(6, 50, 0.5)
    pair.head.step(0.5)
    assert pair.head.steps == 0
    loss = pair.head(torch.randn(0, 6), torch.zeros(0, dtype=torch.int64))
    assert loss == 0
    loss = pair.head(torch.randn(3, 6, requires_grad=True), torch.full((3,), -100))
    loss.backward()
    pair.head.step(0.5)
    assert loss == 0
    assert pair.error() <= 1e-15


def test_a_step_between_forward_and_backward_is_refused():
    head = lossops.FactoredSphericalHead(6, 50)
    x = torch.randn(3, 6, requires_grad=True)
    late = head(x, torch.arange(3))
    head(x, torch.arange(3)).backward()
    head.step(0.1)
    with pytest.raises(RuntimeError, match=r"call backward\(\) before step\(\)"):
        late.backward()


def test_moving_keeps_the_gram_matrix_wide():
    head = lossops.FactoredSphericalHead(6, 50).double().float()
    assert head.table.rows.dtype == torch.float32
    assert head.gram.dtype == torch.float64
    assert not list(head.parameters())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_newton_squares_the_error_of_the_inverse(momentum):
    pair = Pair(6, 50, 0.5, momentum=momentum)
    pair.train(5, 8)
    found = pair.head.factors
    rough = found._replace(inverse=found.inverse * (1 + 1e-5))
    fine = factors.refined(rough)
    off = (fine.factor.T @ fine.inverse - torch.eye(len(found.factor))).abs().max()
    assert off <= 2e-10


RANKS = 2


def _train_shards(rank, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    found = {}
    for momentum in (0.0, 0.9):
        head, x = _sharded_run(momentum, dist.group.WORLD)
        head(x[:4], torch.arange(4)).backward()
        found[momentum] = (head.dense(), head.topk(x, 5), head.check(), head.grad_norm(),
                           head.rows(torch.tensor([0, 30, 2])))  # fmt: skip
    torch.save(found, f"{folder}/{rank}.pt")
    del head  # which holds the group
    dist.barrier()
    dist.destroy_process_group()


def _sharded_run(momentum, group):
    """A head of 31 classes, from the same weight and batches on every rank."""
    torch.manual_seed(5)
    weight = torch.randn(31, 4, dtype=torch.float64)
    head = lossops.FactoredSphericalHead(
        4, 31, momentum=momentum, class_group=group, dtype=torch.float64
    )
    table = head.table
    head.load_dense(weight[table.first : table.first + table.count])
    torch.manual_seed(6)
    with mock.patch.multiple(factored, MOMENTUM_RANGE=4.0, RANGE=1.0):
        for _ in range(52):  # until the table has been rewritten once
            x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(31, (6, 2))
            head(x, y).backward()
            head.step(0.3)
    assert head.epochs > len(table.transforms)
    assert table.live, "rows of several epochs"
    return head, x


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    mp.spawn(_train_shards, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_class_shards_make_one_head(momentum, shards):
    head, x = _sharded_run(momentum, None)
    head(x[:4], torch.arange(4)).backward()
    dense, best, _, norm, rows = zip(*(found[momentum] for found in shards), strict=True)
    assert [len(part) for part in dense] == [16, 15]
    torch.testing.assert_close(torch.cat(dense), head.dense(), rtol=1e-11, atol=1e-13)
    expected = head.topk(x, 5)
    for rank in range(RANKS):
        assert torch.equal(best[rank].indices, expected.indices)
        torch.testing.assert_close(best[rank].values, expected.values)
        torch.testing.assert_close(norm[rank], head.grad_norm())
        torch.testing.assert_close(rows[rank], head.rows(torch.tensor([0, 30, 2])))
        assert shards[rank][momentum][2].gram <= 1e-12


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: lossops.FactoredSphericalHead(0, 5), ValueError, "dim and num_classes"),
        (lambda: lossops.FactoredSphericalHead(4, 5, momentum=1.0), ValueError, "momentum must be"),
        (lambda: lossops.FactoredSphericalHead(4, 5, loss="l1"), ValueError,
         "one of z, taylor, spherical, mse, got 'l1'"),
        (lambda: lossops.FactoredSphericalHead(4, 5, dtype=torch.bfloat16), TypeError,
         "float32 or float64, got torch.bfloat16"),
        (lambda: lossops.FactoredSphericalHead(4, 5)(torch.randn(2, 3), torch.arange(2)),
         ValueError, r"shape \(..., 4\), got torch.float32 of shape \(2, 3\)"),
        (lambda: lossops.FactoredSphericalHead(4, 5)(torch.randn(2, 4), torch.tensor([0, 5])),
         IndexError, r"class ids in \[0, 5\)"),
        (lambda: lossops.FactoredSphericalHead(4, 5)(torch.randn(2, 4), torch.arange(3)),
         ValueError, "target must have shape"),
        (lambda: lossops.FactoredSphericalHead(4, 5).load_dense(torch.randn(4, 5)), ValueError,
         r"weight must have shape \(5, 4\)"),
        (lambda: lossops.FactoredSphericalHead(4, 5).rows(torch.tensor([7])), IndexError,
         r"class ids in \[0, 5\)"),
        (lambda: lossops.optim.FactoredSGD(nn.Linear(2, 2), 0.1), TypeError,
         "head must be a FactoredSphericalHead, got Linear"),
        (lambda: lossops.optim.clip_grad_norm_([nn.Linear(2, 2)], 1.0), TypeError,
         "tensors and factored heads, got Linear"),
        (lambda: lossops.FactoredSphericalHead(4, 5, a=0.0), ValueError, "a must be positive"),
        (lambda: lossops.FactoredSphericalHead(4, 5, weight_decay=0.5).step(2.0), ValueError,
         "must not be 1"),
        (lambda: lossops.FactoredSphericalHead(4, 5).rows(torch.tensor([-1])), IndexError,
         r"class ids in \[0, 5\)"),
        (lambda: lossops.optim.clip_grad_norm_([], -1.0), ValueError, "max_norm must be"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
