"""Weights that are sharded over processes by torch's `fully_shard` (FSDP2; Zhao et al. 2023, arXiv 2304.11277).

Each process holds its part of every weight, as a `DTensor`. A layer's weights are gathered for its forward pass, freed,
gathered again for its backward pass, and freed. The gradients of trained weights are summed over the processes, and
each process gets its part of them. Tensors that are not sharded pass through the functions of this module unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


def shard_modules(modules: Iterable[nn.Module], device: torch.device, whole: set[nn.Parameter]) -> None:
    """Move modules to the device, one after another, and leave each process its part of their parameters there.

    No more than one module is whole on the device at a time. Parameters of modules that come earlier are left out of a
    later one that contains them, so the last one may be the whole network.

    Args:
        modules: in the order of computation, then the module that contains them.
        device: of this process.
        whole: parameters that are not sharded; each process holds them, and sums their gradients itself.
    """
    mesh: DeviceMesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in dict.fromkeys(modules):
        module.register_forward_hook(_copy_views)  # before the hook of `fully_shard`
        sharded: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        sharded.set_gradient_divide_factor(1.0)  # a process's loss is its share of the mean over the whole batch
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other


def _copy_views(_module: nn.Module, _inputs: object, output: Any) -> Any:
    """Return a module's output with copies in place of views.

    What gathers the weights for the backward pass hangs on the output, and an operation in place on a view would lose
    it without an error.
    """
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) and value._is_view() else value, output)


def call_as_forward(module: nn.Module, forward: Callable[..., Any]) -> Any:
    """Return `forward()`, called as the module's forward pass: the hooks that gather its weights run around it."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        return module()
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, without gradients; changes of it change the tensor.

    A tensor that needs neither is returned itself: `clip_gradients` calls this for every gradient of a step.
    """
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all processes, without gradients; every process must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_part(part: Tensor, tensor: Tensor) -> Tensor:
    """Return the full tensor of which each process has a part, as of another tensor; every process must call this.

    Args:
        part: of the size of `local_tensor(tensor)`, on any device.
        tensor: sharded in the same way; if it is not sharded, `part` is the full tensor.
    """
    if not isinstance(tensor, DTensor):
        return part
    mesh, placements, shape, stride = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
    sharded = DTensor.from_local(part.to(tensor.device), mesh, placements, run_check=False, shape=shape, stride=stride)
    return sharded.full_tensor()


def part_of(full: Tensor, tensor: Tensor) -> Tensor:
    """Return a full tensor, which every process has, on the device of another one and sharded as that one is."""
    full = full.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return full
    return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)


def total_norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of all numbers of these tensors; 0 without tensors. Every process must call this."""
    if not tensors:
        return 0.0
    norms = torch.stack(torch._foreach_norm([local_tensor(tensor) for tensor in tensors]))
    if any(map(is_sharded, tensors)):
        sharded = torch.tensor([is_sharded(tensor) for tensor in tensors], device=norms.device)
        squares = norms[sharded].square().sum()
        dist.all_reduce(squares)
        norms = torch.cat([norms[~sharded], squares.sqrt()[None]])
    return float(torch.linalg.vector_norm(norms))
