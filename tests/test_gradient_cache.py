"""`gradient_cache` against one graph of the whole batch: the same loss, the same gradients.

Losses are plain PyTorch. With dropout the reference encodes the same sub-batches in the same order
and keeps all graphs.
"""

from __future__ import annotations

import gc
import weakref
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lossops.gradient_cache import gradient_cache

B, D = 10, 4
WIDTHS = (6, 5)  # features of the inputs of two towers


def encoder(width, p=0.0, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Linear(width, 8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, D), nn.Dropout(p)
        return nn.Sequential(*layers).double()


def two_towers(p=0.0):
    return [encoder(width, p, seed) for seed, width in enumerate(WIDTHS)]


def batches(*rows, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, width, generator=draw, dtype=torch.float64)
        for n, width in zip(rows, WIDTHS, strict=False)
    ]


class InfoNCE(nn.Module):
    """Row i of a belongs to row i of b, whose other rows are negatives; learnable temperature."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, a, b):
        z = self.log_scale.exp() * F.normalize(a) @ F.normalize(b).T
        return F.cross_entropy(z, torch.arange(len(a), device=z.device))


def plain(encoders, inputs, loss_fn, sub_batch=B):
    """The same loss with all graphs kept, after its backward."""
    encoded = [
        torch.cat([encode(x) for x in batch.split(sub_batch)])
        for encode, batch in zip(encoders, inputs, strict=True)
    ]
    loss = loss_fn(*encoded)
    loss.backward()
    return loss.detach()


def gradients(*modules):
    """Gradients of those that are modules, which forget them; a shared one counts once."""
    listed = [m for m in dict.fromkeys(modules) if isinstance(m, nn.Module)]
    found = [p.grad for m in listed for p in m.parameters()]
    for m in listed:
        m.zero_grad()
    return found


def assert_close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance or {"rtol": 1e-10, "atol": 1e-13})


def compare(encoders, inputs, loss_fn, sub_batch, whole=None):
    """`gradient_cache` against `plain`, with ``whole`` as its sub-batch, from the same seed."""
    torch.manual_seed(7)
    expected = plain(encoders, inputs, loss_fn, whole or sub_batch)
    expected_grads, state = gradients(*encoders, loss_fn), torch.get_rng_state()
    torch.manual_seed(7)
    found = gradient_cache(encoders, inputs, loss_fn, sub_batch=sub_batch)
    assert_close([found, *gradients(*encoders, loss_fn)], [expected, *expected_grads])
    assert not found.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


# Exactness


@pytest.mark.parametrize("sub_batch", [1, 3, B, B + 1])
def test_equals_the_whole_batch(sub_batch):
    compare(two_towers(), batches(B, B), InfoNCE(), sub_batch, whole=B)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("sub_batch", [1, 3, B])
def test_replays_draw_the_same_dropout_masks(sub_batch, device):
    encoders = [e.to(device) for e in two_towers(p=0.4)]
    inputs = [x.to(device) for x in batches(B, B)]
    compare(encoders, inputs, InfoNCE().to(device), sub_batch)


def test_random_loss_draws_once():
    def loss_fn(a, b):
        return (a @ b.T * torch.rand(len(a), len(b))).sum()

    compare(two_towers(p=0.4), batches(B, B), loss_fn, 3)


def test_towers_of_different_batch_sizes():
    """More negatives than queries: one tower has five sub-batches, the other two."""
    compare(two_towers(p=0.2), batches(4, 10), InfoNCE(), 2)


def test_one_tower():
    loss_fn = InfoNCE()
    loss_fn.forward = lambda a: InfoNCE.forward(loss_fn, a, a.roll(1, 0))
    compare([encoder(6, p=0.2)], batches(B), loss_fn, 3)


def test_shared_tower():
    tower = encoder(6, p=0.2)
    x = torch.randn(2, B, 6, dtype=torch.float64)
    compare([tower, tower], [*x], InfoNCE(), 3)


def test_gradients_are_added():
    encoders, inputs, loss_fn = two_towers(), batches(B, B), InfoNCE()
    for _ in range(2):
        plain(encoders, inputs, loss_fn)
    expected = gradients(*encoders, loss_fn)
    for sub_batch in (3, 4):
        gradient_cache(encoders, inputs, loss_fn, sub_batch=sub_batch)
    assert_close(gradients(*encoders, loss_fn), expected)


def test_gradient_of_inputs():
    encoders, inputs, loss_fn = two_towers(), batches(B, B), InfoNCE()
    inputs[0].requires_grad_()
    plain(encoders, inputs, loss_fn)
    expected, inputs[0].grad = inputs[0].grad, None
    gradient_cache(encoders, inputs, loss_fn, sub_batch=3)
    assert_close(inputs[0].grad, expected)


class Pair(nn.Module):
    """Takes two tensors and what is no tensor."""

    def __init__(self):
        super().__init__()
        self.inner = encoder(6)

    def forward(self, x, y, scale=1.0):
        return scale * self.inner(x + y["y"])


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "partial", "method"])
def test_structured_inputs(kind):
    pair, other, loss_fn = Pair(), encoder(5), InfoNCE()
    x, y = torch.randn(2, B, 6, dtype=torch.float64)
    texts = torch.randn(B, 5, dtype=torch.float64)
    plain([lambda s: 2 * pair.inner(s), other], [x + y, texts], loss_fn)
    expected = gradients(pair, other, loss_fn)
    encode, batch = {
        "tuple": (pair, (x, {"y": y}, 2.0)),
        "list": (pair, [x, {"y": y}, 2.0]),
        "dict": (pair, {"x": x, "scale": 2.0, "y": {"y": y}}),
        "partial": (partial(pair, scale=2.0), (x, {"y": y})),
        "method": (pair.forward, (x, {"y": y}, 2.0)),
    }[kind]
    gradient_cache((encode, other), (batch, texts), loss_fn, sub_batch=4)
    assert_close(gradients(pair, other, loss_fn), expected)


# Mixed precision


class Watched(nn.Module):
    """Notes the autocast state of each forward."""

    def __init__(self, inner, seen):
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, *args):
        self.seen.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return self.inner(*args)


def test_autocast():
    """All forwards run under autocast; the cache of cast weights loses no gradient to no_grad."""
    seen = set()
    encoders = [Watched(e.float(), seen) for e in two_towers(p=0.2)]
    inputs, loss_fn = [x.float() for x in batches(B, B)], Watched(InfoNCE().float(), seen)
    torch.manual_seed(7)
    # Without the cache, since it adds up gradients of cast weights in bfloat16.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        encoded = [
            torch.cat([e(part) for part in x.split(3)])
            for e, x in zip(encoders, inputs, strict=True)
        ]
        expected = loss_fn(*encoded)
    expected.backward()
    expected_grads = gradients(*encoders, loss_fn)
    torch.manual_seed(7)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient_cache(encoders, inputs, loss_fn, sub_batch=3)
    assert seen == {(True, torch.bfloat16)}
    assert_close(
        [found, *gradients(*encoders, loss_fn)], [expected.detach(), *expected_grads],
        rtol=1e-5, atol=1e-7,
    )  # fmt: skip


def test_backward_outside_autocast():
    """As PyTorch asks: an autocast backward would round what the forward computed in float32."""
    seen = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            seen.append(torch.is_autocast_enabled("cpu"))
            return dx

    w = torch.randn(6, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradient_cache(
            [lambda x: Square.apply(x @ w)], [torch.randn(5, 6)],
            lambda r: Square.apply(r).float().square().sum(), sub_batch=2,
        )  # fmt: skip
    assert seen == [False] * 4


def test_grad_scaler():
    encoders, inputs, loss_fn = two_towers(), batches(B, B), InfoNCE()
    expected = plain(encoders, inputs, loss_fn)
    expected_grads = gradients(*encoders, loss_fn)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = gradient_cache(encoders, inputs, loss_fn, sub_batch=3, scaler=scaler)
    assert_close(found, expected)
    modules = nn.ModuleList([*encoders, loss_fn])
    assert_close([p.grad for p in modules.parameters()], [1024 * g for g in expected_grads])
    optimizer = torch.optim.SGD(modules.parameters(), lr=0.1)
    before = [p.detach().clone() for p in modules.parameters()]
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    stepped = [p - 0.1 * g for p, g in zip(before, expected_grads, strict=True)]
    assert_close([p.detach() for p in modules.parameters()], stepped)


# What need not be done


class Counted(nn.Module):
    """An encoder with the list of its calls' rows."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, []

    def forward(self, x):
        self.calls.append(len(x))
        return self.inner(x)


def test_frozen_encoder_is_replayed_once():
    """Whether it has a graph is seen on its first sub-batch."""
    frozen, other = encoder(6).requires_grad_(False), encoder(5)
    inputs, loss_fn = batches(B, B), InfoNCE()
    plain([frozen, other], inputs, loss_fn)
    expected = gradients(other, loss_fn)
    encode = Counted(frozen)
    gradient_cache([encode, other], inputs, loss_fn, sub_batch=3)
    assert encode.calls == [3, 3, 3, 1, 3]
    assert_close(gradients(other, loss_fn), expected)


def test_frozen_module_that_hides_a_parameter():
    frozen = encoder(6).requires_grad_(False)
    hidden = torch.ones(D, dtype=torch.float64, requires_grad=True)
    frozen.register_forward_hook(lambda m, args, out: out * hidden)
    inputs = batches(B)
    plain([frozen], inputs, lambda r: r.square().sum())
    expected, hidden.grad = hidden.grad, None
    gradient_cache([frozen], inputs, lambda r: r.square().sum(), sub_batch=3)
    assert_close(hidden.grad, expected)


def test_graph_in_some_sub_batches_only():
    """Without a module that says it is frozen, each sub-batch is asked."""
    w = torch.ones(D, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, D, dtype=torch.float64)
    gradient_cache([lambda t: t if t.equal(x[:2]) else t * w], [x], torch.sum, sub_batch=2)
    assert_close(w.grad, x[2:].sum(0))


def test_tower_the_loss_does_not_use():
    encoders, inputs = two_towers(), batches(B, B)
    encode = Counted(encoders[1])
    gradient_cache([encoders[0], encode], inputs, lambda a, b: a.square().mean(), sub_batch=5)
    assert encode.calls == [5, 5]
    assert all(g is None for g in gradients(encoders[1]))
    assert all(g is not None for g in gradients(encoders[0]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_there_is_no_replay(mode):
    encoders, inputs, loss_fn = two_towers(), batches(B, B), InfoNCE()
    expected = plain(encoders, inputs, loss_fn)
    gradients(*encoders, loss_fn)
    encode = Counted(encoders[0])
    with mode():
        found = gradient_cache([encode, encoders[1]], inputs, loss_fn, sub_batch=5)
    assert_close(found, expected)
    assert encode.calls == [5, 5]
    assert all(g is None for g in gradients(*encoders, loss_fn))


def test_encoder_may_return_what_it_holds():
    """Representations become leaves that want a gradient; the encoder's own tensors do not."""
    held = torch.randn(B, D)
    loss = gradient_cache([lambda t: held], [X], torch.sum, sub_batch=B)
    assert torch.equal(loss, held.sum())
    assert not held.requires_grad


# Memory


class Saved:
    """A tensor that a graph keeps."""

    def __init__(self, tensor):
        self.tensor = tensor


def most_saved(function):
    """The most tensors that graphs keep at the same time while ``function`` runs."""
    alive, most = weakref.WeakSet(), 0

    def pack(tensor):
        nonlocal most
        kept = Saved(tensor)
        alive.add(kept)
        most = max(most, len(alive))
        return kept

    gc.disable()  # what a cycle keeps alive counts
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            function()
    finally:
        gc.enable()
    return most


def test_one_graph_at_a_time():
    deep = nn.Sequential(*(encoder(D) for _ in range(8)))
    x = torch.randn(B, D, dtype=torch.float64)
    one = most_saved(lambda: deep(x[:2]).sum())
    loss_fn = InfoNCE()
    found = most_saved(lambda: gradient_cache([deep, deep], [x, x], loss_fn, sub_batch=2))
    assert found == one
    assert most_saved(lambda: plain([deep, deep], [x, x], loss_fn)) > 2 * one


def test_nothing_of_a_replay_is_left_for_the_next():
    """Not even what an autograd function keeps on its context until its node dies."""
    alive, most = weakref.WeakSet(), []

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            most.append(len(alive))
            ctx.kept = Saved(x)
            alive.add(ctx.kept)
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return dx

    w = torch.randn(6, 4, requires_grad=True)
    gradient_cache(
        [lambda x: Keeps.apply(x @ w)], [torch.randn(6, 6)], lambda r: r.square().sum(), sub_batch=2
    )
    assert most == [0] * 6


def test_inputs_are_not_copied():
    inner, places = encoder(6), set()

    def encode(x):
        places.add(x.untyped_storage().data_ptr())
        return inner(x)

    (x,) = batches(B)
    gradient_cache([encode], [x], lambda r: r.square().sum(), sub_batch=3)
    assert places == {x.untyped_storage().data_ptr()}


# Bad input


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(D), nn.SyncBatchNorm(D), nn.BatchNorm1d(D, track_running_stats=False)]
)
def test_batch_norm_is_refused(norm):
    module = nn.Sequential(nn.Linear(6, D), norm)
    x = torch.randn(B, 6)
    if norm.running_mean is None:
        norm.eval()
    for encode in (module, module.forward, partial(module)):
        with pytest.raises(ValueError, match=rf"encoders\[0\] must .* {type(norm).__name__} '1'"):
            gradient_cache([encode], [x], torch.sum, sub_batch=3)


def test_batch_norm_in_eval_mode():
    norm = nn.BatchNorm1d(6).double()
    norm(torch.randn(20, 6, dtype=torch.float64))
    towers = two_towers()
    compare([nn.Sequential(norm.eval(), towers[0]), towers[1]], batches(B, B), InfoNCE(), 3)


LINEAR = nn.Linear(6, D)
X = torch.randn(B, 6)
BAD = {
    "encoders is a module": (
        {"encoders": nn.Sequential(LINEAR)}, TypeError, "encoders must be a sequence, .* Sequential"
    ),
    "inputs is a tensor": ({"inputs": X}, TypeError, "inputs must be a sequence, .* got Tensor"),
    "lengths": ({"inputs": [X, X]}, ValueError, "got 1 encoders and 2 inputs"),
    "none": ({"encoders": [], "inputs": []}, ValueError, "got 0 encoders"),
    "not callable": ({"encoders": [3]}, TypeError, r"encoders\[0\] must be callable, got int"),
    "loss_fn": ({"loss_fn": 3}, TypeError, "loss_fn must be callable, got int"),
    "sub_batch 0": ({"sub_batch": 0}, ValueError, "sub_batch must be at least 1, got 0"),
    "sub_batch float": ({"sub_batch": 2.0}, TypeError, "sub_batch must be an int, got float"),
    "sub_batch bool": ({"sub_batch": True}, TypeError, "sub_batch must be an int, got bool"),
    "scaler": ({"scaler": 2.0}, TypeError, "scaler must be None or a GradScaler, got float"),
    "no tensor": ({"inputs": [{"x": 3}]}, TypeError, r"inputs\[0\] must be .* got dict without"),
    "no rows": ({"inputs": [X[:0]]}, ValueError, r"inputs\[0\] must .* got shapes \(0, 6\)"),
    "no dims": ({"inputs": [X.sum()]}, ValueError, r"at least 1, .* got shapes \(\)"),
    "rows differ": (
        {"inputs": [(X, X[:2])]}, ValueError, r"same number.* got shapes \(10, 6\), \(2, 6\)"
    ),
    "inputs with a graph": (
        {"inputs": [X.clone().requires_grad_() * 2]}, ValueError, r"inputs\[0\] must be leaves"
    ),
    "two tensors": (
        {"encoders": [lambda x: (x, x)]}, TypeError, r"encoders\[0\] must return .* got tuple"
    ),
    "3-d": (
        {"encoders": [lambda x: x[None]]}, TypeError, r"here \(3, D\), got .*float32 \(1, 3, 6\)"
    ),
    "rows of representations": (
        {"encoders": [lambda x: x[:2]]}, TypeError, r"here \(3, D\), got .*float32 \(2, 6\)"
    ),
    "integers": ({"encoders": [lambda x: x.long()]}, TypeError, r"got torch.int64 \(3, 6\)"),
    "no loss": ({"loss_fn": lambda r: None}, TypeError, "loss_fn returns must be a tensor, got No"),
    "losses": ({"loss_fn": lambda r: r.sum(1)}, ValueError, r"one number, got shape \(10,\)"),
    "constant": ({"loss_fn": lambda r: r.detach().sum()}, ValueError, "do not detach them"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "sentence"), BAD.values(), ids=BAD)
def test_errors(change, error, sentence):
    arguments = {"encoders": [LINEAR], "inputs": [X], "loss_fn": torch.sum, "sub_batch": 3}
    with pytest.raises(error, match=sentence):
        gradient_cache(**{**arguments, **change})


def test_random_state_after_an_error_in_a_replay():
    """Training that catches it goes on from the state after the loss."""
    calls = []

    def encode(x):
        calls.append(x)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return F.dropout(x, 0.5).requires_grad_()

    with pytest.raises(RuntimeError, match="out of memory"):
        gradient_cache([encode], [X], torch.sum, sub_batch=5)
    found = torch.rand(3)
    torch.manual_seed(0)
    for part in X.split(5):
        F.dropout(part, 0.5)
    assert torch.equal(torch.rand(3), found)


# Processes. One group of two serves all tests here: starting one takes seconds.

ROWS = (7, 4)  # of each rank
SUB_BATCHES = (2, 3)  # four sub-batches on one rank, two on the other


class Branches(nn.Module):
    """Both towers in one module, of which a call uses one, and the parameter of the loss."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList(two_towers())
        self.loss = InfoNCE()

    def forward(self, x, tower):
        return self.towers[tower](x)


class Buffered(nn.Module):
    """A tower with a buffer, which DistributedDataParallel broadcasts before forwards."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("offset", torch.zeros(D, dtype=torch.float64))

    def forward(self, x):
        return self.inner(x) + self.offset


def separate(modules, inputs):
    return modules, inputs


def shared(modules, inputs):
    return [modules[0], modules[0]], [inputs[0], inputs[0].roll(1, 0)]


def branches(modules, inputs):
    return [partial(modules[0], tower=i) for i in range(2)], inputs


def hidden(modules, inputs):
    return [lambda x, m=m: m(x) for m in modules], inputs


def local(rank, modules):
    """A mean over local rows."""
    return InfoNCE()


def one_sided(rank, modules):
    """The loss of one rank leaves the second tower out."""
    return InfoNCE() if rank == 0 else lambda a, b: a.square().mean()


# Modules, whether a replay leaves out some parameters, encoders and inputs made of the modules, and
# the loss on each rank.
CASES = {
    "separate": (lambda: [Buffered(e) for e in two_towers()], False, separate, local),
    "shared": (lambda: [encoder(6)], False, shared, local),
    "branches": (lambda: [Branches()], True, branches, lambda rank, modules: modules[0].loss),
    "one_sided": (two_towers, False, separate, one_sided),
    "hidden": (two_towers, False, hidden, local),
}
STEPS = 3  # DistributedDataParallel rebuilds its buckets in the second


def rank_inputs(rank, step):
    return batches(ROWS[rank], ROWS[rank], seed=10 * step + rank)


def parallel_steps(rank, make, unused, arrange, loss_of):
    """Gradients after each step, and how often each module reduced its own."""
    modules = make()
    ddp = [DistributedDataParallel(m, find_unused_parameters=unused) for m in modules]
    reduced = [[] for _ in ddp]
    for m, calls in zip(ddp, reduced, strict=True):
        m.register_comm_hook(
            calls, lambda calls, bucket: (calls.append(1), allreduce_hook(None, bucket))[1]
        )
    found = []
    for step in range(STEPS):
        encoders, inputs = arrange(ddp, rank_inputs(rank, step))
        # What hides its modules needs as many sub-batches on all ranks: two.
        sub_batch = SUB_BATCHES[rank] if arrange is not hidden else ROWS[rank] // 2 + 1
        gradient_cache(encoders, inputs, loss_of(rank, modules), sub_batch=sub_batch)
        found.append([g.clone() for g in gradients(*modules)])
    return found, [len(calls) for calls in reduced]


def refused():
    """What is said of modules that would not reduce, or not what they should."""
    frozen = DistributedDataParallel(encoder(6))
    frozen.requires_grad_(False)
    left_out = partial(DistributedDataParallel(Branches()), tower=0)
    static = DistributedDataParallel(encoder(6), static_graph=True)
    said = []
    for encode in (frozen, left_out, static):
        try:
            gradient_cache([encode], batches(B), torch.sum, sub_batch=3)
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    return said


def in_each_process(rank, folder):
    """What the tests below compare, saved by each rank."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
        timeout=timedelta(seconds=30),
    )  # fmt: skip
    torch.set_num_threads(1)
    found = {name: parallel_steps(rank, *case) for name, case in CASES.items()}
    found["refused"] = refused()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(in_each_process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_distributed_data_parallel(name, ranks):
    """The mean of the ranks' losses, differentiated in one process; sub-batches ragged."""
    make, _, arrange, loss_of = CASES[name]
    modules = make()
    for step in range(STEPS):
        for rank in range(2):
            plain(*arrange(modules, rank_inputs(rank, step)), loss_of(rank, modules))
        expected = [g / 2 for g in gradients(*modules)]
        for rank in range(2):
            assert_close(ranks[rank][name][0][step], expected)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_reduced_once(name, ranks):
    replays = 2 if name == "hidden" else 1
    for rank in range(2):
        counts = ranks[rank][name][1]
        assert counts == [replays * STEPS] * len(counts)


def test_modules_that_would_not_reduce_are_refused(ranks):
    for found in ranks:
        frozen, left_out, static = found["refused"]
        assert "encoders[0] is a DistributedDataParallel whose representations have no" in frozen
        assert "find_unused_parameters=True" in left_out
        assert "got static_graph=True; pass static_graph=False" in static
