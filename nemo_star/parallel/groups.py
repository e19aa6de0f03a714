"""Start of the processes: backend, device, process groups, and small exchanges between ranks.

Under torchrun the usual environment variables say who this process is; without them it is alone. NCCL where CUDA is,
gloo elsewhere. Ranks are laid out as Megatron does by default, tensor parallel fastest: tp, cp, dp, pp.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from nemo_star.parallel.layout import Layout
from nemo_star.runtime.launch import check_launcher, environment_local_rank

T = TypeVar("T")
NO_LIMIT = timedelta(days=20)
"""For collectives; the watchdog sets the limit. More would overflow where gloo counts milliseconds in 32 bits."""


def initialize() -> torch.device:
    """Join the default process group (once) and return this process's device.

    Raises:
        ValueError: the launcher did not say who this process is, or there are more processes than GPUs.
    """
    if not dist.is_initialized():
        check_launcher()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", environment_local_rank()[0])
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"{environment_local_rank()[1]} processes on a machine with {torch.cuda.device_count()} GPUs: "
                "start one process for each"
            )
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=NO_LIMIT)
        else:
            initialize_alone(backend)
    return device


def initialize_alone(backend: str = "gloo") -> None:
    """A default process group of this process only: Megatron asks for one even to read a checkpoint."""
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def leave_groups() -> None:
    """Leave all process groups, once; a process that ends without that may abort when a peer has gone first."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Groups:
    """The process groups of one rank."""

    collection: ProcessGroupCollection
    """Megatron's: tp, cp, pp, dp, tp_cp, dp_cp, ep; goes through the constructors of its modules."""
    layout: Layout
    replica: dist.ProcessGroup
    """The ranks that answer one request together: tp, cp and pp."""

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def cp(self) -> dist.ProcessGroup:
        return self.collection.cp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.collection.pp

    @property
    def dp(self) -> dist.ProcessGroup:
        return self.collection.dp


def create_groups(layout: Layout, *, cp_max_ctas: int | None = None) -> Groups:
    """All groups that inference uses; nothing is trained, so Megatron's embedding groups stay unset.

    Groups of equal members are one object, because each is a communicator of its own on NCCL, with its own buffers on
    the device. All that goes over them is issued by one thread, in an order that is the same on all ranks. Not so what
    experts exchange beside attention: `ep` is its own. Nor is torch's default group taken for one: a program that
    embeds this one may use it, with a time limit of its own.

    Args:
        cp_max_ctas: `parallel.context_parallel_max_ctas`; cp is then a group of its own on NCCL, limited alone.
    """
    dimensions = ("pp", "dp", "cp", "tp")
    ranks = torch.arange(dist.get_world_size()).view(layout.pp, layout.dp, layout.cp, layout.tp)
    made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}

    def group(*inside: str, alone: bool = False, options: Any = None) -> dist.ProcessGroup:
        """The group of this rank over the named dimensions; all ranks make all groups, in the same order."""
        others = [dim for dim, name in enumerate(dimensions) if name not in inside]
        within = [dim for dim, name in enumerate(dimensions) if name in inside]
        members = ranks.permute(*others, *within).flatten(0, len(others) - 1).flatten(1).tolist()
        key = tuple(sorted(map(tuple, members)))  # of all groups, not of this rank's: all ranks decide alike
        alone = alone or options is not None
        if not alone and key in made:
            return made[key]
        mine, _ = dist.new_subgroups_by_enumeration(members, timeout=NO_LIMIT, pg_options=options)
        return mine if alone else made.setdefault(key, mine)

    few = None if cp_max_ctas is None or dist.get_backend() != "nccl" else _nccl_options(cp_max_ctas)
    groups = {name: group(name, options=few if name == "cp" else None) for name in ("tp", "cp", "pp", "dp")}
    groups["tp_cp"] = group("cp", "tp")
    if layout.ep > 1:
        groups["ep"] = group("cp", alone=True)  # what experts exchange is in no order with attention's
    groups["dp_cp"] = group("dp", "cp")  # the copies of a weight, for dist_checkpointing
    return Groups(ProcessGroupCollection(**groups, embd=None, pos_embd=None), layout, group("pp", "cp", "tp"))


def _nccl_options(max_ctas: int) -> Any:
    """Options of an NCCL communicator, as Megatron makes them (`core/parallel_state.py: get_nccl_options`)."""
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = max_ctas
    options._timeout = NO_LIMIT  # torch takes `timeout` and warns where the two differ
    return options


def groups_from_parallel_state() -> Groups:
    """The groups of a program that has called Megatron's `parallel_state.initialize_model_parallel` itself."""
    collection = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "pp", "dp", "tp_cp", "dp_cp", "embd"])
    sizes = (group.size() for group in (collection.tp, collection.cp, collection.dp, collection.pp))
    layout = Layout(*sizes)
    if layout.pp == 1:
        return Groups(collection, layout, collection.tp_cp)
    replicas = gather_objects(collection.dp.rank())
    enumeration = [[r for r, d in enumerate(replicas) if d == replica] for replica in sorted(set(replicas))]
    replica, _ = dist.new_subgroups_by_enumeration(enumeration)
    return Groups(collection, layout, replica)


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's contiguous `tensor`, stacked in rank order: [group size, *shape]; one collective."""
    gathered = tensor.new_empty(group.size() * tensor.shape[0], *tensor.shape[1:])
    # torch 2.13 renames the function and warns of its old name.
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(gathered, tensor, group=group)
    return gathered.view(group.size(), *tensor.shape)


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait for all ranks of a group (None: of all).

    On NCCL a barrier is a collective of a tensor on some device, which torch has to guess unless it is told.
    """
    on_gpus = dist.get_backend(group) == "nccl"
    dist.barrier(group, device_ids=[torch.cuda.current_device()] if on_gpus else None)


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's `value`, in rank order, on every rank."""
    gathered: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def on_first_rank(make: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `make` on the first rank of a group (None: of all) and give its result to every rank of it; its ValueError or
    OSError is raised on every rank."""
    box: list[T | Exception | None] = [None]
    if dist.get_rank(group) == 0:
        try:
            box[0] = make()
        except (ValueError, OSError) as error:
            box[0] = error
    dist.broadcast_object_list(box, group=group, group_src=0)
    result = box[0]
    if isinstance(result, ValueError | OSError):
        raise result
    return cast(T, result)


def broadcast_orders(make: Callable[[], list[T]], group: dist.ProcessGroup) -> list[T]:
    """A list of the group's first rank, on every rank; `make` is called there. An empty one costs 8 bytes.

    Args:
        group: of gloo.
    """
    if group.size() == 1:
        return make()
    orders = make() if group.rank() == 0 else []
    content = pickle.dumps(orders) if orders else b""
    size = torch.tensor([len(content)])
    dist.broadcast(size, group=group, group_src=0)
    if not int(size):
        return []
    packed = torch.empty(int(size), dtype=torch.uint8)
    if content:
        packed.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(packed, group=group, group_src=0)
    return orders if group.rank() == 0 else pickle.loads(packed.numpy().tobytes())


def on_every_rank(make: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `make` on every rank of the group (None: all); if it fails anywhere, every rank raises the first failing
    rank's error, by name."""
    failure = None
    result: T | None = None
    try:
        result = make()
    except Exception as error:
        failure = str(error) if isinstance(error, ValueError) else repr(error)
    failures = gather_objects(failure, group)
    for rank, message in enumerate(failures):
        if message is not None:
            number = rank if group is None else dist.get_global_rank(group, rank)
            raise ValueError(message if len(set(failures)) == 1 else f"rank {number}: {message}")
    return cast(T, result)
