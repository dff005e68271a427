"""Training in several processes: sharing the rows, sharding the base, one number from all.

Adapters are small: every process holds all of them, and DistributedDataParallel averages their gradients. The
frozen base is complete in every process too, or, with `train.parallel=fsdp`, its blocks are sharded with FSDP2
(`fully_shard`): a process holds its share of each block's packed 4-bit weights and gathers a block just for
the time of its forward or backward pass; where several machines train, each shards among its own processes. The weights are packed in the compute type
(`bnb_4bit_quant_storage`), which is what lets FSDP shard them. Leaving the adapters out of the shards keeps
them plain tensors: modules that share a pair, groups of learning rates and saving work as in one process.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any

import torch
from torch import distributed as dist

from spectraqlora.errors import InputError
from spectraqlora.models.hardware import device
from spectraqlora.scoring.head_loss import HeadLoss
from spectraqlora.scoring.loss import score
from spectraqlora.settings import TrainSettings

_BLOCK = re.compile(r"^(?:(?!\.\d+\.).)*\.\d+$")
"""Module paths that end with their first number: the outermost numbered blocks."""


def process_count(settings: TrainSettings) -> int:
    """How many processes train: as asked for, else one per GPU, else one.

    Raises:
        InputError: more than there are GPUs.
    """
    gpus = torch.cuda.device_count()
    if gpus and settings.processes > gpus:
        raise InputError("train.processes", settings.processes, f"at most {gpus}, the GPUs of this machine")
    return settings.processes or max(gpus, 1)


def world_size() -> int:
    """Processes that train together with this one, itself included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def node_count() -> int:
    """Machines that train together with this one, itself included."""
    return world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def process_index() -> int:
    """This process's number among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that writes and reports."""
    return process_index() == 0


def split_batch(settings: TrainSettings, count: int) -> tuple[int, int]:
    """(rows per forward pass of one process, forward passes per step) so that a step's rows stay the same.

    Processes first take over accumulation's passes, then divide the rows of a pass.

    Raises:
        InputError: the rows of a step do not divide by the processes.
    """
    passes = math.gcd(settings.gradient_accumulation, count)
    rows, left = divmod(settings.batch_size, count // passes)
    if left or not rows:
        raise InputError(
            "train.batch_size",
            settings.batch_size,
            f"a multiple of {count // passes}, so that {count} processes see the rows that one would see",
        )
    return rows, settings.gradient_accumulation // passes


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The outermost numbered blocks of a model, in order."""
    return [module for name, module in model.named_modules() if _BLOCK.match(name)]


def shard_base(model: Any) -> None:
    """Shard the frozen weights of a PEFT model's blocks over the processes of each machine, in place.

    Several machines hold the same shards: gathering a block never waits for the network between them.
    Embeddings, head and adapters are not sharded. A model loaded on the CPU reaches the GPU block by block.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    nodes = node_count()
    mesh = (
        init_device_mesh(device(), (world_size(),))
        if nodes == 1
        else init_device_mesh(
            device(), (nodes, world_size() // nodes), mesh_dim_names=("between machines", "within a machine")
        )
    )
    sharded = blocks(model)
    of_blocks = {parameter for block in sharded for parameter in block.parameters()}
    adapters = {p for name, p in model.named_parameters() if "lora_" in name}
    for block in sharded:
        block.to(device())
        fully_shard(block, mesh=mesh, ignored_params=adapters)
    model.to(device())
    # The root holds no shards: it orders the blocks' gathering, so that the next one comes early.
    fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()) - of_blocks | adapters)


def trainer_class() -> Any:
    """`transformers.Trainer`, which with several processes averages gradients of the adapters alone."""
    from transformers import Trainer

    if world_size() == 1:
        return Trainer

    class AdapterParallel(Trainer):  # type: ignore[misc, unused-ignore]
        def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
            kind = torch.nn.parallel.DistributedDataParallel
            if isinstance(model, kind) or not training:
                return model
            # Frozen weights are the same file everywhere, or shards; neither is DDP's to compare or send.
            frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
            buffers = [name for name, _ in model.named_buffers()]
            kind._set_params_and_buffers_to_ignore_for_model(model, frozen + buffers)
            # An expert may be without tokens in a batch, and then its adapter without a gradient.
            sparse = any("expert" in name for name, p in model.named_parameters() if p.requires_grad)
            return kind(model, find_unused_parameters=sparse)

    return AdapterParallel


def mean_loss(model: Any, rows: Any, batch_size: int, head: HeadLoss, packing: bool = False) -> float:
    """Mean loss per counted token over all rows (nats), each process scoring its share.

    Every process runs equally many forward passes, since sharded blocks are gathered by all at once: where
    the rows do not divide, some are scored twice and counted once.
    """
    count = world_size()
    if count == 1:
        return score(model, rows, batch_size, head, packing).loss
    places = range(process_index(), -(-len(rows) // count) * count, count)
    part = rows.select([place % len(rows) for place in places])
    scored = score(model, part, batch_size, head, packing)
    own = sum(place < len(rows) for place in places)
    sums = torch.tensor(
        [sum(scored.losses[:own]), float(sum(scored.tokens[:own]))], dtype=torch.float64, device=device()
    )
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def all_max(value: int) -> int:
    """The largest of all processes' values."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every process's tensor, in the order of their numbers; all of one shape."""
    if world_size() == 1:
        return [tensor]
    own = tensor.to(device())
    tensors = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(tensors, own)
    return tensors


def broadcast_text(text: str) -> str:
    """The first process's text, in every process; sent as bytes, so that nothing is unpickled."""
    if world_size() == 1:
        return text
    size = torch.tensor(len(text.encode()), device=device())
    dist.broadcast(size, src=0)
    sent = torch.zeros(int(size), dtype=torch.uint8, device=device())
    if is_main():
        sent = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device())
    dist.broadcast(sent, src=0)
    return bytes(sent.tolist()).decode()
