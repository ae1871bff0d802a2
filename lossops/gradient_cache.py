"""Contrastive batches larger than what the encoders can hold at once.

    L = loss_fn(r),   r_i = encoder(x_i)      ∂L/∂θ = Σ_i (∂r_i/∂θ)ᵀ ∂L/∂r_i

The loss couples all rows, but through the representations r alone. With ∂L/∂r at hand the rows are
independent again, so that the encoders run a second time with one sub-batch's graph at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from lossops.inputs import check_tensor
from lossops.schedules import without_autocast

__all__ = ["gradient_cache"]

Encoder = Callable[..., Any]
RandomState = list[Tensor]


def gradient_cache(
    encoders: Sequence[Encoder] | nn.ModuleList,
    inputs: Sequence[Any],
    loss_fn: Callable[..., Tensor],
    *,
    sub_batch: int,
    scaler: GradScaler | None = None,
) -> Tensor:
    """Loss and gradients of a contrastive batch, with the encoders' memory of a sub-batch.

    L = loss_fn(r_1, ..., r_K),   r_k = encoder_k(inputs_k);   adds ∂L/∂θ to ``.grad``

    Takes the place of ``loss_fn(*representations).backward()``.

    Args:
        encoders: one per tower; each returns a floating point tensor (b, D). One that stands here
            twice is a shared tower.
        inputs: one per encoder, with B rows of its own: a tensor (B, ...), passed alone; a tuple or
            list, passed as arguments; a dict, passed by keywords. Tensors anywhere inside are
            sliced, all else is passed as it is.
        loss_fn: ``loss_fn(*representations) -> ()``, from tensors (B, D). It is called once; what
            else it differentiates, such as a temperature, gets its gradient too.
        sub_batch: rows per call of an encoder; the last call takes what is left.
        scaler: for mixed precision in float16; gradients come out scaled. Default: ``None``.

    Returns:
        The loss, (), detached and unscaled. With grad mode off this is all that happens.

    Raises:
        ValueError: shapes or numbers that do not fit, BatchNorm that looks at its batch, inputs
            computed with a gradient. TypeError: arguments or representations of another kind.
        RuntimeError: a DistributedDataParallel that waits for parameters the last replay left out.

    Note:
        Memory: the activations of one sub-batch, 2·B·D for representations and their gradients,
        5 KB of random state per sub-batch, and what ``loss_fn`` takes; inputs are not copied. Time:
        each encoder's forward runs twice.

        Exact, dropout included: a replay starts from the random state of PyTorch (the CPU's, and
        that of each device inputs or parameters are on) that its first pass started from, and
        training goes on from the state after ``loss_fn``. Other generators, such as NumPy's, are
        not replayed. Called under autocast, encoders and ``loss_fn`` run in it, backwards outside.
        BatchNorm in training mode is refused, since its statistics would be those of a sub-batch
        and updated twice; other state that a forward updates is the caller's care.

        An encoder that is a DistributedDataParallel (or a ``partial``, a method, ``torch.compile``
        of one) reduces its gradients once, in its last replay, whatever the number of sub-batches
        on each rank. One that stands deeper inside reduces in every replay, which needs as many
        sub-batches on all ranks. Where the last replay leaves out some of its parameters (towers
        that use different parts of it, a temperature of ``loss_fn`` inside it), it needs
        ``find_unused_parameters=True``. Other parameters of ``loss_fn`` are reduced by a
        DistributedDataParallel of their own, or not at all.

    Example:
        >>> import torch
        >>> from lossops.gradient_cache import gradient_cache
        >>> images, texts = torch.nn.Linear(16, 8), torch.nn.Linear(24, 8)
        >>> scale = torch.nn.Parameter(torch.tensor(0.1))
        >>> def info_nce(a, b):
        ...     return torch.nn.functional.cross_entropy(scale * a @ b.T, torch.arange(len(a)))
        >>> batch = torch.randn(64, 16), torch.randn(64, 24)
        >>> loss = gradient_cache((images, texts), batch, info_nce, sub_batch=16)
        >>> images.weight.grad.shape, scale.grad.shape
        (torch.Size([8, 16]), torch.Size([]))

    Reference:
        L. Gao, Y. Zhang, J. Han, J. Callan: Scaling Deep Contrastive Learning Batch Size under
        Memory Limited Setup, arXiv 2101.06983.
    """
    towers = _towers(encoders, inputs, sub_batch)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    if not isinstance(scaler, GradScaler | None):
        raise TypeError(f"scaler must be None or a GradScaler, got {type(scaler).__name__}")
    devices = _devices(towers)
    wanted = torch.is_grad_enabled()
    loss, gradients, starts = _first_pass(towers, loss_fn, scaler, devices, wanted)
    if wanted:
        end = _random_state(devices)
        try:
            _replay_all(towers, gradients, starts, devices)
        finally:
            _set_random_state(devices, end)
    return loss


class _Tower(NamedTuple):
    """An encoder with its batch: ``module`` is the one behind it, ``rows`` are its sub-batches."""

    name: str
    encoder: Encoder
    module: nn.Module | None
    batch: Any
    rows: list[slice]

    def encode(self, rows: slice) -> Tensor:
        """Representations of some rows, (b, D)."""
        part = tree_map_only(Tensor, lambda t: t[rows], self.batch)
        if isinstance(part, dict):
            found = self.encoder(**part)
        elif isinstance(part, tuple):
            found = self.encoder(*part)
        else:
            found = self.encoder(part)
        b = rows.stop - rows.start
        if (
            not isinstance(found, Tensor)
            or found.shape[:-1] != (b,)
            or not found.is_floating_point()
        ):
            got = type(found).__name__
            if isinstance(found, Tensor):
                got = f"{found.dtype} {tuple(found.shape)}"
            raise TypeError(
                f"{self.name} must return one floating point tensor (b, D), here ({b}, D), "
                f"got {got}; pool and pick the representations inside the encoder"
            )
        return found

    @property
    def parallel(self) -> DistributedDataParallel | None:
        return self.module if isinstance(self.module, DistributedDataParallel) else None

    @property
    def frozen(self) -> bool:
        """Whether no parameter of the module is trained; unknown, so False, without a module."""
        m = self.module
        return m is not None and not any(p.requires_grad for p in m.parameters())


def _towers(encoders: Any, inputs: Any, sub_batch: int) -> list[_Tower]:
    """Checked encoders with their inputs."""
    for name, given in (("encoders", encoders), ("inputs", inputs)):
        if isinstance(given, str) or not isinstance(given, Sequence | nn.ModuleList):
            raise TypeError(
                f"{name} must be a sequence, one entry per tower, got {type(given).__name__}; "
                f"of a single tower pass ({name[:-1]},)"
            )
    if len(encoders) != len(inputs) or not len(encoders):
        raise ValueError(
            f"inputs must have one entry per encoder, got {len(encoders)} encoders and "
            f"{len(inputs)} inputs"
        )
    if not isinstance(sub_batch, int) or isinstance(sub_batch, bool):
        raise TypeError(f"sub_batch must be an int, got {type(sub_batch).__name__}")
    if sub_batch < 1:
        raise ValueError(f"sub_batch must be at least 1, got {sub_batch}")
    towers = []
    for i, (encoder, batch) in enumerate(zip(encoders, inputs, strict=True)):
        if not callable(encoder):
            raise TypeError(f"encoders[{i}] must be callable, got {type(encoder).__name__}")
        module = _module(encoder)
        _check_module(f"encoders[{i}]", module)
        if isinstance(batch, Mapping):
            batch = dict(batch)
        elif isinstance(batch, list | tuple):
            batch = tuple(batch)
        n = _checked_rows(f"inputs[{i}]", batch)
        rows = [slice(k, min(k + sub_batch, n)) for k in range(0, n, sub_batch)]
        towers.append(_Tower(f"encoders[{i}]", encoder, module, batch, rows))
    return towers


def _module(encoder: Any) -> nn.Module | None:
    """The module that an encoder calls, where one can tell."""
    if isinstance(encoder, partial):
        return _module(encoder.func)
    if isinstance(encoder, MethodType):
        return _module(encoder.__self__)
    if not isinstance(encoder, nn.Module):
        return None
    compiled = getattr(encoder, "_orig_mod", None)  # of torch.compile(module)
    return compiled if isinstance(compiled, nn.Module) else encoder


def _check_module(name: str, module: nn.Module | None) -> None:
    """Raise a ValueError for what comes out wrong when a forward is replayed in parts."""
    if isinstance(module, DistributedDataParallel) and module.static_graph:
        raise ValueError(
            f"{name} must be a DistributedDataParallel that can leave out reductions, got "
            "static_graph=True; pass static_graph=False"
        )
    for path, m in () if module is None else module.named_modules():
        # Without running statistics it looks at its batch in eval mode as well.
        if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None):
            raise ValueError(
                f"{name} must treat rows independently, got {type(m).__name__} {path!r} that "
                "normalizes by statistics of its batch, here of a sub-batch, and updates them in "
                "both passes; call its .eval() or use GroupNorm or LayerNorm (SyncBatchNorm does "
                "not help)"
            )


def _checked_rows(name: str, batch: Any) -> int:
    """How many rows a batch has."""
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    if not tensors:
        raise TypeError(
            f"{name} must be a tensor or a tuple, list or dict of tensors, "
            f"got {type(batch).__name__} without any tensor"
        )
    shapes = [tuple(t.shape) for t in tensors]
    if len({s[:1] for s in shapes}) > 1 or shapes[0][:1] in ((), (0,)):
        raise ValueError(
            f"tensors of {name} must have the same number of rows, at least 1, as their first dim, "
            f"got shapes {', '.join(map(str, shapes))}"
        )
    if any(t.requires_grad and not t.is_leaf for t in tensors):
        raise ValueError(
            f"{name} must be leaves, got a tensor computed with a gradient, whose graph each "
            "sub-batch would go through again; compute it inside the encoder or pass its .detach()"
        )
    return shapes[0][0]


def _first_pass(
    towers: list[_Tower],
    loss_fn: Callable[..., Tensor],
    scaler: GradScaler | None,
    devices: list[torch.device],
    wanted: bool,
) -> tuple[Tensor, list[Tensor | None], list[list[RandomState]]]:
    """The loss, detached; if wanted ∂L/∂r (B, D) of each tower; each sub-batch's random state.

    Representations and the graph of the loss end with this function, before the first replay.
    """
    representations: list[Tensor] = []
    starts: list[list[RandomState]] = []
    with torch.no_grad():
        for tower in towers:
            parts: list[Tensor] = []
            starts.append([])
            for rows in tower.rows:
                starts[-1].append(_random_state(devices))
                parts.append(tower.encode(rows))
            representations.append(torch.cat(parts))  # a copy: encoders may return what they hold
    for r in representations:
        r.requires_grad_(wanted)
    loss = loss_fn(*representations)
    check_tensor("what loss_fn returns", loss)
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return one number, got shape {tuple(loss.shape)}")
    if not wanted:
        return loss.detach(), [], []
    if not loss.requires_grad:
        raise ValueError("loss_fn must return a loss that depends on representations, got one "
                         "without a gradient; do not detach them")  # fmt: skip
    with without_autocast(loss.device):
        (loss if scaler is None else scaler.scale(loss)).backward()
    gradients = [r.grad for r in representations]
    for i, tower in enumerate(towers):
        # A tower may be unused on one rank only: the others wait for this one's gradients.
        if gradients[i] is None and tower.parallel is not None:
            gradients[i] = torch.zeros_like(representations[i], requires_grad=False)
    return loss.detach(), gradients, starts


def _replay_all(
    towers: list[_Tower],
    gradients: list[Tensor | None],
    starts: list[list[RandomState]],
    devices: list[torch.device],
) -> None:
    """Encode again, with a graph, and add Σ_i (∂r_i/∂θ)ᵀ ∂L/∂r_i to ``.grad``."""
    last = {id(tower.module): i for i, tower in enumerate(towers)}
    for i, (tower, gradient) in enumerate(zip(towers, gradients, strict=True)):
        if gradient is None:
            continue
        parallel = tower.parallel
        for rows, start in zip(tower.rows, starts[i], strict=True):
            reduces = last[id(tower.module)] == i and rows is tower.rows[-1]
            _set_random_state(devices, start)
            with nullcontext() if parallel is None or reduces else parallel.no_sync():
                found = _replay(tower, rows, gradient)
            if parallel is not None and reduces:
                if not found:
                    raise ValueError(
                        f"{tower.name} is a DistributedDataParallel whose representations have no "
                        "gradient, so that it would reduce none; pass .module of a frozen tower"
                    )
                # Buckets that wait for a parameter would mix with the next call's, in silence.
                parallel._check_reducer_finalized()
            if not found and parallel is None and tower.frozen:
                break  # its first sub-batch has shown what its parameters say


def _replay(tower: _Tower, rows: slice, gradient: Tensor) -> bool:
    """One sub-batch, whose graph ends with this function; whether it had one."""
    found = tower.encode(rows)
    if found.requires_grad:
        with without_autocast(found.device):
            torch.autograd.backward(found, gradient[rows])
    return found.requires_grad


def _devices(towers: list[_Tower]) -> list[torch.device]:
    """Devices besides the CPU whose random numbers encoders may draw."""
    tensors = [t for tower in towers for t in tree_leaves(tower.batch) if isinstance(t, Tensor)]
    for tower in towers:
        tensors.extend(() if tower.module is None else tower.module.parameters())
    found = dict.fromkeys(t.device for t in tensors)
    return [device for device in found if device.type not in ("cpu", "meta")]


def _random_state(devices: list[torch.device]) -> RandomState:
    """Of the CPU, then of each device."""
    others = (torch.get_device_module(d).get_rng_state(d) for d in devices)
    return [torch.get_rng_state(), *others]


def _set_random_state(devices: list[torch.device], state: RandomState) -> None:
    torch.set_rng_state(state[0])
    for device, other in zip(devices, state[1:], strict=True):
        torch.get_device_module(device).set_rng_state(other, device)
