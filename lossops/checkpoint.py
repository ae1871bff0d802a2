"""Checkpoints of a head whose classes are spread over ranks, for any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossops.partial_fc import PartialFC
from lossops.row_optim import RowAdamW, RowSGD


class ShardedState:
    """A head and its optimizer as torch.distributed.checkpoint reads and writes them.

    Every tensor with a row per class, (V_r, ...) on each rank, is saved as one DTensor (V, ...), so
    that a checkpoint of R ranks loads on any other number of them: weights, momentum, counts. The
    rest is the same on all ranks.

    Args:
        head: the head.
        optimizer: of ``head.parameters()``, or None for the head alone. Default: ``None``.

    Example:
        >>> import tempfile, torch, lossops
        >>> import torch.distributed.checkpoint as dcp
        >>> head = lossops.PartialFC(4, 100)
        >>> optimizer = lossops.optim.RowSGD(head.parameters(), 0.1, 0.9)
        >>> folder = tempfile.mkdtemp()
        >>> state = {"head": lossops.ShardedState(head, optimizer)}
        >>> _ = dcp.save(state, checkpoint_id=folder, no_dist=True)
        >>> dcp.load(state, checkpoint_id=folder, no_dist=True)  # here, or on other ranks
    """

    def __init__(self, head: PartialFC, optimizer: RowSGD | RowAdamW | None = None) -> None:
        if optimizer is not None and not isinstance(optimizer, RowSGD | RowAdamW):
            raise TypeError(
                f"optimizer must be RowSGD, RowAdamW or None, got {type(optimizer).__name__}"
            )
        self.head, self.optimizer = head, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Tensors that share memory with the head and the optimizer, and what else they keep."""
        found: dict[str, Any] = {"weight": self._of_classes(self.head.weight.detach())}
        found["numbers"] = {"step": self.head.step, "num_classes": self.head.num_classes}
        if self.head.log_scale is not None:
            found["log_scale"] = self.head.log_scale.detach()
        if self.optimizer is None:
            return found
        state = self.optimizer.row_state(self.head.weight)
        found["rows"] = {name: self._of_classes(t) for name, t in state.items()}
        found["groups"] = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        if isinstance(self.optimizer, RowSGD):
            found["steps"] = self.optimizer.steps(self.head.weight).tolist()
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What was loaded into the tensors of `state_dict` in place, and the rest."""
        numbers = state["numbers"]
        if numbers["num_classes"] != self.head.num_classes:
            raise ValueError(
                f"the checkpoint is of {numbers['num_classes']} classes, this head has "
                f"{self.head.num_classes}"
            )
        self.head.step = numbers["step"]
        if self.optimizer is None:
            return
        for group, saved in zip(self.optimizer.param_groups, state["groups"], strict=True):
            group.update(saved)
        if isinstance(self.optimizer, RowSGD):
            steps = torch.tensor(state["steps"], dtype=torch.float64)
            self.optimizer.set_steps(self.head.weight, steps.reshape(-1, 2, 2))

    def _of_classes(self, t: Tensor) -> Tensor:
        """(V_r, ...) of each rank as (V, ...)."""
        shards = self.head.shards
        if shards.group is None:
            return t
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(shards.group, t.device.type)
        shape = (self.head.num_classes, *t.shape[1:])
        return DTensor.from_local(
            t, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=t.stride()
        )
