"""One model cut up among devices: FSDP2 for Lightning, with files that do not show it.

Every tensor of weights, gradients and optimiser state lies in parts, one on each device; a block's weights are put together while it is at work.
What is saved is whole, under the names and numbers of an unsharded run, and what is loaded may have been saved by one. Knows tensors, processes and
Lightning's strategies. Knows no model but that it has `layers`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def shard(model: nn.Module, mesh: DeviceMesh, *, entry: str) -> None:
    """Cut the parameters of each of `model.layers`, and the rest as one group. `entry` is the method that training calls in place of `forward`."""
    for layer in model.get_submodule("layers").children():
        fully_shard(layer, mesh=mesh)
    # By default the last group stays whole until the backward pass, and after a validation, which has none, for good.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, entry)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor (which may be empty), or the tensor itself where it is whole. Writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together, detached. Where it is sharded, every process must ask for it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def like(full: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, which every process has, cut as `example` is and put on its device."""
    if not isinstance(example, DTensor):
        return full.to(example.device)
    # No source rank: each process keeps its own part of what it has, and nothing is sent.
    return distribute_tensor(full.to(example.device), example.device_mesh, example.placements, src_data_rank=None)


def gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Tensors put together one by one. Sharded ones move to the CPU, and only where `keep` is true; elsewhere the result is empty."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            gathered[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return gathered


class ShardedStrategy(ModelParallelStrategy):
    """Data parallelism with FSDP2 over all processes. Checkpoints are single files, the same as those of unsharded training."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        # In place of Lightning's own, which makes a mesh of nodes and leaves the devices of a node to tensor parallelism.
        self._setup_distributed()
        self._device_mesh = init_device_mesh(self.root_device.type, (self.world_size,), mesh_dim_names=("data_parallel",))
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return gather(self.lightning_module.state_dict(), keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state under the numbers of its parameters, as it saves itself; whole on the first process."""
        state = optimizer.state_dict()
        return {"state": {number: gather(values, keep=self.is_global_zero) for number, values in state["state"].items()}, **_groups(state)}

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The file as it is; it stays on the disk until a tensor is used."""
        return torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own, given = self.lightning_module.state_dict(), checkpoint["state_dict"]
        cut = {name: like(tensor, own[name]) if name in own else tensor for name, tensor in given.items()}
        self.lightning_module.load_state_dict(cut, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            cut: Callable[[Tensor, Tensor], Tensor] = lambda value, p: like(value, p) if value.shape == p.shape else value  # noqa: E731
            states = {n: {name: cut(value, parameters[n]) for name, value in values.items()} for n, values in state["state"].items()}
            optimizer.load_state_dict({"state": states, **_groups(state)})


def _groups(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "state"}
