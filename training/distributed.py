"""Training one model in several processes: started here or by torchrun; DDP, or sharded weights (FSDP2).

Plain ``torch.distributed``: it needs one group, one wrapper and whole checkpoints. Every process
takes its own rows of the same batch, and losses are weighted by their number of items, so that the result is
that of one process with the whole batch, up to the order of sums.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed, nn

from ..errors import BuildError, UsageError
from ..models.decoder import DecoderBlock
from ..models.qllama import DecoderLayer
from ..models.vit import Block

T = TypeVar("T")
Strategy = Literal["ddp", "fsdp"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp")


class Objective(nn.Module):
    """A model and its losses as one module: DDP and FSDP2 hook into the call of a module.

    Args:
        model: to train.
        losses: (model, arguments of :meth:`forward`) -> losses by name.
    """

    def __init__(self, model: nn.Module, losses: Callable[..., dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self._losses = model, losses

    def forward(self, *batch: Any) -> dict[str, Tensor]:
        """Scalar losses by name; their sum is trained."""
        return self._losses(self.model, *batch)


def world() -> int:
    """Number of processes that train together; 1 without a group."""
    return distributed.get_world_size() if _grouped() else 1


def rank() -> int:
    """Which of them this is; 0 keeps the files and reports."""
    return distributed.get_rank() if _grouped() else 0


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def own_rows(batch: int, processes: int | None = None) -> slice:
    """The rows of a batch that this process takes: every ``world``-th.

    So the halves of its rows, which are right and wrong captions for matching, come from the batch's halves.
    ``processes`` is their number; None: that of this group.

    Raises:
        UsageError: ``batch`` cannot be shared so.
    """
    count = processes or world()
    if batch % (2 * count) and count > 1:
        raise UsageError(
            f"A batch of {batch} cannot be shared by {count} processes.",
            "Each takes as many right as wrong captions.",
            f"Give a multiple of {2 * count} as --batch.",
        )
    return slice(rank(), None, count)


def select_rows(batch: T, rows: slice) -> T:
    """A batch (a dataclass of tensors and of such) with ``rows`` of every tensor."""
    return _mapped(batch, lambda tensor: tensor[rows])


def to_device(batch: T, to: torch.device) -> T:
    """A batch on another device."""
    return _mapped(batch, lambda tensor: tensor.to(to))


def weight(counted: Tensor) -> Tensor:
    """Factor of a mean over ``counted`` items, so that the mean over processes is right."""
    if world() == 1:
        return torch.ones((), device=counted.device)
    total = counted.detach().float().clone()
    distributed.all_reduce(total)
    return counted * world() / total.clamp_min(1)


def averaged(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Losses as numbers: the mean of all processes'."""
    values = torch.stack([loss.detach().float() for loss in losses.values()])
    if world() > 1:
        distributed.all_reduce(values)
        values /= world()
    return dict(zip(losses, values.tolist(), strict=True))


def parallel(objective: Objective, strategy: Strategy, *, unused: bool = True) -> nn.Module:
    """``objective`` as every process calls it; itself where there is one only.

    ``ddp`` keeps the model whole in each, ``fsdp`` a part of every block's weights and of the rest. Make
    optimizers afterwards: the parameters of ``fsdp`` are new ones. ``unused``: some parameters that learn may
    take no part in a step.
    """
    if world() == 1:
        return objective
    if strategy == "ddp":
        return nn.parallel.DistributedDataParallel(objective, find_unused_parameters=unused)
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(objective, FSDPModule):  # since an earlier stage
        return objective
    scalars = {p for p in objective.parameters() if p.dim() == 0}  # nothing to shard
    for module in objective.modules():
        if isinstance(module, Block | DecoderLayer | DecoderBlock):
            fully_shard(module)
    fully_shard(objective, ignored_params=scalars)
    return objective


def clip_gradients(parameters: list[nn.Parameter], most: float) -> float:
    """Scale the gradients to a joint norm of at most ``most``, and return their norm.

    Gradients of parameters that FSDP2 does not shard are averaged first.

    Raises:
        BuildError: the norm is not finite.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    local = [_local(g) for g in gradients if _is_sharded(g)]
    if local:
        whole = [g for g in gradients if not _is_sharded(g)]
        for gradient in whole:
            distributed.all_reduce(gradient)
            gradient /= world()
        squares = torch.stack([g.float().square().sum() for g in local]).sum()
        distributed.all_reduce(squares)
        norm = torch.stack([squares, *(g.float().square().sum() for g in whole)]).sum().sqrt()
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        for gradient in [*local, *whole]:
            gradient *= factor
    else:
        norm = nn.utils.clip_grad_norm_(parameters, most)
    if not torch.isfinite(norm):
        raise BuildError("Training stopped: gradients are not finite.", fix="Use a smaller --lr.")
    return float(norm)


def whole(tree: Any) -> Any:
    """State dicts with sharded tensors gathered; every process must call it."""
    if isinstance(tree, Tensor):
        return tree.full_tensor() if _is_sharded(tree) else tree  # type: ignore[attr-defined]
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(value) for value in tree] if isinstance(tree, list) else tree


def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take the parameters of a whole ``state``, sharded as the model is."""
    with torch.no_grad():
        for key, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(_shared_out(state[key], tensor))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take a whole ``state``, its tensors sharded as their parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {
        i: {k: _shared_out(v, parameters[i]) for k, v in values.items()}
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": sharded})


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _mapped(value: T, change: Callable[[Tensor], Tensor]) -> T:
    if isinstance(value, Tensor):
        return change(value)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _mapped(getattr(value, f.name), change) for f in fields(value)})
    return value


def _is_sharded(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def _shared_out(value: Any, like: Tensor) -> Any:
    """``value`` sharded as ``like`` is, if it is a tensor of its shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def run_processes(processes: int, work: Callable[..., T], arguments: tuple[Any, ...], **own: Any) -> T | None:
    """``work(*arguments)`` in each of ``processes``; the result in the first one, None in the others.

    Where ``torchrun`` started the processes, each calls this and joins the others; ``processes`` is ignored.
    Otherwise this is the first, and the others are started here: ``work`` and ``arguments`` must be
    picklable. The first one gets ``own`` as well.

    Raises:
        BuildError: another process failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        first = os.environ["RANK"] == "0"
        result = _in_group(work, arguments, own if first else {})
        return result if first else None
    if processes == 1:
        return work(*arguments, **own)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // processes)
    others = [
        context.Process(target=_other, args=(r, processes, port, threads, work, arguments))
        for r in range(1, processes)
    ]
    before = {name: os.environ.get(name) for name in _place(0, processes, port)}
    for process in others:
        process.start()
    os.environ.update(_place(0, processes, port))
    try:
        return _in_group(work, arguments, own)
    except RuntimeError as error:
        for process in others:
            process.join(timeout=5)
        broken = [r for r, process in enumerate(others, 1) if process.exitcode not in (None, 0)]
        if not broken:
            raise
        raise BuildError(f"Process {broken[0]} of {processes} failed.", str(error).splitlines()[0]) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        for process in others:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()


def _in_group(work: Callable[..., T], arguments: tuple[Any, ...], own: Mapping[str, Any]) -> T:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(device())
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        return work(*arguments, **own)
    finally:
        distributed.destroy_process_group()


def _other(
    number: int, processes: int, port: int, threads: int, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(_place(number, processes, port))
    torch.set_num_threads(threads)
    _in_group(work, arguments, {})


def _place(number: int, processes: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun sets."""
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
