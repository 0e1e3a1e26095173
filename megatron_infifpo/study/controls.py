"""Sources that are none: what a gain by fusion must be compared with.

Each is a log-prob dataset in the place of a real source's, so that nothing else differs.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.logprob_writer import LogprobWriter

UNIFORM = -float(np.log(256))  # a token as likely as any other of so many
CERTAIN = -1e-6, -20.0
Row = tuple[np.ndarray, np.ndarray]


def shuffled(store: Path, output: Path, domains: Sequence[str], seed: int) -> Path:
    """Deal a source's records out anew within their domains: its margins, of other prompts."""
    read, rng = LogprobStore(store), random.Random(f"shuffled {seed}")
    place = list(range(len(read)))
    for domain in sorted(set(domains)):
        alike = [i for i, found in enumerate(domains) if found == domain and not read.masked(i)]
        for index, other in zip(alike, rng.sample(alike, len(alike)), strict=True):
            place[index] = other
    return _write(store, output, lambda i: (read.sums(place[i]), read.counts(place[i])))


def uniform(store: Path, output: Path) -> Path:
    """A source without content: the mean log-prob of every answer is the same."""
    read = LogprobStore(store)
    return _write(store, output, lambda i: (read.counts(i) * UNIFORM, read.counts(i)))


def truth(store: Path, output: Path, verdicts: np.ndarray) -> Path:
    """A source that is certain of the right response where a pair has one, and is against others.

    Args:
        store: of the initial pivot.
        output: prefix to write.
        verdicts: `[N]`, 1 where the chosen response is right and the other is not.
    """
    read = LogprobStore(store)
    both = {1: CERTAIN, 0: CERTAIN[::-1]}

    def row(index: int) -> Row:
        others = [CERTAIN[1]] * (len(read.counts(index)) - 2)
        return np.array([*both[int(verdicts[index] == 1)], *others]), read.counts(index)

    return _write(store, output, row)


def _write(like: Path, output: Path, row: Callable[[int], Row]) -> Path:
    """Write the sums of every record that `like` has."""
    read = LogprobStore(like)
    manifest: dict[str, Any] = {**read.manifest, "model": output.name}
    for name in ("top_k", "masked", "notes", "remarks"):
        manifest.pop(name, None)
    with LogprobWriter(
        output, responses=read.manifest["responses"], manifest=manifest, values=False
    ) as writer:
        for index in range(len(read)):
            if read.masked(index):
                writer.mask(str(index), read.note(index) or "masked")
            else:
                sums, counts = row(index)
                writer.add_sums(str(index), list(map(float, sums)), list(map(int, counts)))
    return output
