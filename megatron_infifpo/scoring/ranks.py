"""What the ranks of a scoring job share: one decision, one bar, a common end."""

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any, Self

import torch.distributed as dist
from tqdm import tqdm

from megatron_infifpo.ranks import rank


def world_size() -> int:
    """The number of ranks, once torch.distributed runs."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_first_rank(function: Callable[[], Any]) -> Any:
    """Compute something on rank 0 and give it to all.

    Raises:
        Exception: from the function, on rank 0; the other ranks exit, since one report is enough.
    """
    if world_size() == 1:
        return function()
    shared: list[Any] = [None, False]
    try:
        if rank() == 0:
            shared = [function(), True]
    finally:
        dist.broadcast_object_list(shared, src=0)
    if not shared[1]:
        raise SystemExit(2)
    return shared[0]


class Progress:
    """One bar over all ranks: each counts what it has done, rank 0 draws the sum."""

    def __init__(self, title: str, total: int, finished: int, *, shards: int, counts: bool) -> None:
        """Start the bar; all ranks must call this together.

        Args:
            title: what is going on.
            total: records of the whole job.
            finished: records that an earlier run has done.
            shards: how many shards all ranks have to write.
            counts: whether this rank's work counts (one of those that share a model does).
        """
        self._store = _shared_store()
        self._counts, self._shards = counts, shards
        self._start = self._drawn = time.monotonic()
        self._bar = tqdm(
            desc=title,
            total=total,
            initial=finished,
            unit=" records",
            smoothing=0,  # shards hold all lengths, so the whole run's rate tells the time left
            disable=rank() != 0,
        )

    def add(self, records: int, tokens: int) -> None:
        """Count work of this rank."""
        if self._counts:
            self._store.add("records", records)
            self._store.add("tokens", tokens)
        if time.monotonic() - self._drawn > 0.5:
            self._draw()

    def wrote(self) -> None:
        """Count a shard that is on the disk."""
        self._store.add("shards", 1)

    def wait(self) -> None:
        """Wait until all ranks have written their shards, the bar still running.

        Exits if a rank has failed: it has said why.
        """
        try:
            while self._store.add("shards", 0) < self._shards:
                if self._store.add("failed", 0):
                    raise SystemExit(2)
                self._draw()
                time.sleep(0.2)
            self._draw()
        except dist.DistError:  # rank 0, which keeps the store, is gone
            raise SystemExit(2) from None

    def __enter__(self) -> Self:
        """Return the bar."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the bar, and tell the other ranks of a failure."""
        self._bar.close()  # what is printed next has a line of its own
        if kind is not None:
            with contextlib.suppress(dist.DistError):
                self._store.add("failed", 1)
                time.sleep(1)  # let them read it before rank 0 takes the store along

    def _draw(self) -> None:
        """Bring rank 0's bar up to date."""
        if rank() != 0:
            return
        self._drawn = time.monotonic()
        records, tokens = (self._store.add(name, 0) for name in ("records", "tokens"))
        rate = tokens / max(self._drawn - self._start, 1e-9)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(records - (self._bar.n - self._bar.initial))


def _shared_store() -> dist.Store:
    """A key-value store of its own that all ranks see; rank 0 keeps it."""
    if world_size() == 1:
        return dist.HashStore()
    host, store = os.environ.get("MASTER_ADDR", "localhost"), None
    if rank() == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    port = on_first_rank(lambda: store.port if store else 0)
    return store or dist.TCPStore(host, port, is_master=False)
