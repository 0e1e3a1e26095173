"""Ranks that share the work of a conversion; alone without torchrun."""

import torch.distributed as dist

from megatron_infifpo.ranks import rank_and_size


class Share:
    """This rank's part of a list of independent pieces of work.

    Attributes:
        rank, world: this process among those that torchrun started.
    """

    def __init__(self, *, alone: bool = False) -> None:
        """Join the other ranks, over gloo: conversion is a matter of disks and CPUs.

        Args:
            alone: do all of it; the other ranks do not call.
        """
        self.rank, self.world = (0, 1) if alone else rank_and_size()
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")

    @property
    def first(self) -> bool:
        """Whether this rank does what only one may do."""
        return self.rank == 0

    def mine(self, index: int) -> bool:
        """Whether piece `index` is this rank's."""
        return index % self.world == self.rank

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()
