"""Several processes that read one data set together."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from ..errors import DataError
from .statistics import FeatureStatistics, merge_shares


@dataclass(frozen=True)
class Share:
    """The part of the data that this process reads: every `world`-th record, from `rank` on."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_this_process(cls, distributed: bool | None) -> Share:
        """Return the share of this process: the whole where it is alone, or told to be."""
        import torch.distributed as dist

        if distributed is False or not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def has(self, number: int) -> bool:
        """Return whether a record belongs to the share."""
        return number % self.world == self.rank


def join(own: FeatureStatistics | Exception, share: Share) -> FeatureStatistics:
    """Return the statistics of all processes together, in each of them.

    Args:
        own: what this process has, or the error that stopped it: then all stop, instead of waiting for it.
        share: its share.

    Raises:
        DataError: another process failed; the message is its own.
    """
    from safetensors.torch import load, save

    if share.world == 1:
        if isinstance(own, Exception):
            raise own
        return own
    if isinstance(own, Exception):
        message = {"error": f"{type(own).__name__}: {own}"}
        tensors: dict[str, torch.Tensor] = {}
    else:
        tensors, message = own.to_tensors()
    text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    packed = save({**{name: tensor.contiguous() for name, tensor in tensors.items()}, "description": text})
    shares = []
    failed = []
    for rank, data in enumerate(_gather(packed)):
        found = load(data)
        description = json.loads(bytes(found.pop("description").numpy()))
        if "error" in description:
            failed.append(f"process {rank}: {description['error']}")
        else:
            shares.append(FeatureStatistics.from_tensors(found, description))
    if isinstance(own, Exception):
        raise own
    if failed:
        raise DataError(f"The statistics were not finished in another process ({'; '.join(failed)}).")
    return merge_shares(shares)


def _gather(data: bytes) -> list[bytes]:
    """Return everyone's bytes; the collectives for objects would unpickle them."""
    import torch.distributed as dist

    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(own)], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.cat([own, own.new_zeros(longest - len(own))])
    everyone = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(everyone, padded)
    return [bytes(part[: int(size)].cpu().numpy()) for part, size in zip(everyone, sizes, strict=True)]
