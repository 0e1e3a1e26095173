"""Checksums of a torch_dist folder: written after every save, looked at by whoever reads.

`checksums.json` has the CRC-32 of every block of every file. Blocks, so that a reader of weights
does not read optimizer states to trust them, and so that threads and ranks share the work. It shows
damage, as by a disk, a copy that was cut or a file of another save; it is no signature.
"""

import json
import threading
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.aside import write_text

CHECKSUMS = "checksums.json"
BLOCK = 16 << 20  # bytes
_PIECE = 1 << 20  # bytes in memory at once, a thread
_THREADS = 4


def write_checksums(directory: Path, rank: int, world: int) -> None:
    """Write the checksums of a folder that is complete; all ranks that wrote it call this.

    Each reads back the files that it wrote, which its own machine has in memory most likely.

    Args:
        directory: of `__RANK_N.distcp` files.
        rank, world: this process among those of the default process group, where there is one.
    """
    own = sorted(directory.glob(f"__{rank}_*.distcp"))
    if rank == 0:
        own += [directory / ".metadata", directory / "metadata.json"]
    found: list[Any] = [{path.name: _file_entry(path) for path in own}]
    if world > 1:
        everyone: list[Any] | None = [None] * world if rank == 0 else None
        dist.gather_object(found[0], everyone, dst=0)
        found = everyone or []
    if rank != 0:
        return
    files = {name: entry for part in found for name, entry in sorted(part.items())}
    content = {"algorithm": "crc32", "block_bytes": BLOCK, "files": files}
    write_text(directory / CHECKSUMS, json.dumps(content) + "\n")


def _file_entry(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda block: block_sum(path, block), range(_blocks(size)))
        return {"bytes": size, "crc32": "".join(sums)}


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def block_sum(path: Path, block: int) -> str:
    """Return the checksum of one block of a file, 8 hexadecimal digits."""
    total = 0
    with open(path, "rb", buffering=0) as file:
        file.seek(block * BLOCK)
        for _ in range(BLOCK // _PIECE):
            piece = file.read(_PIECE)
            if not piece:
                break
            total = zlib.crc32(piece, total)
    return f"{total:08x}"


class Checksums:
    """What the files of a folder must be; knows which blocks were looked at.

    Attributes:
        sums: by file, the checksums of its blocks; empty where the folder has none, as those that
            Megatron or older versions wrote.
    """

    def __init__(self, directory: Path) -> None:
        """Read `checksums.json`.

        Raises:
            UserError: it is broken, or of a kind that is not known.
        """
        self.directory = directory
        self.sums: dict[str, list[str]] = {}
        self._good: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        path = directory / CHECKSUMS
        if not path.is_file():
            return
        try:
            content = json.loads(path.read_text(encoding="ascii"))
            if (content["algorithm"], content["block_bytes"]) != ("crc32", BLOCK):
                raise ValueError(f"unknown kind {content['algorithm']!r}")
            for name, entry in content["files"].items():
                digits, blocks = entry["crc32"], _blocks(entry["bytes"])
                if len(digits) != 8 * blocks or Path(name).name != name:
                    raise ValueError(f"{name!r} has {len(digits)} digits for {blocks} blocks")
                self.sums[name] = [digits[8 * i : 8 * i + 8] for i in range(blocks)]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path} is broken ({error}): take another checkpoint, or remove the file if you "
                "trust the others"
            ) from None

    def all_blocks(self) -> list[tuple[str, int]]:
        """Every block of every file, in order."""
        return [(name, i) for name, sums in self.sums.items() for i in range(len(sums))]

    def check_range(self, name: str, start: int, stop: int) -> None:
        """Check the blocks that hold these bytes of a file, each once.

        Raises:
            UserError: a block is not what was written.
        """
        blocks = range(start // BLOCK, min(_blocks(stop), len(self.sums.get(name, ()))))
        self.check((name, block) for block in blocks)

    def check(self, blocks: Iterable[tuple[str, int]]) -> None:
        """Check blocks that were not yet.

        Raises:
            UserError: names the first file that is not what was written.
        """
        with self._lock:
            wanted = [block for block in blocks if block not in self._good]
        if not wanted:
            return
        with ThreadPoolExecutor(min(_THREADS, len(wanted))) as pool:
            for (name, block), found in zip(wanted, pool.map(self._sum, wanted), strict=True):
                if found != self.sums[name][block]:
                    raise UserError(self._damage(name, block))
        with self._lock:
            self._good.update(wanted)

    def _sum(self, block: tuple[str, int]) -> str:
        path = self.directory / block[0]
        return block_sum(path, block[1]) if path.is_file() else ""

    def _damage(self, name: str, block: int) -> str:
        place = f"in bytes {block * BLOCK} to {(block + 1) * BLOCK}"
        folder = self.directory.parent
        others = sorted(p.name for p in folder.glob("iter_*") if p != self.directory)
        advice = (
            f"write the number of another checkpoint ({', '.join(others)}) into "
            f"{folder}/latest_checkpointed_iteration.txt"
            if others
            else "copy or make it again"
        )
        return (
            f"{self.directory / name} is damaged {place}: it is not what was written, by "
            f"{CHECKSUMS}; {advice}"
        )


def verify_share(checksums: Checksums, rank: int, world: int) -> None:
    """Check this rank's share of all blocks, so that all ranks together read all files once.

    Raises:
        UserError: a block is not what was written.
    """
    blocks = checksums.all_blocks()
    checksums.check(blocks[rank * len(blocks) // world : (rank + 1) * len(blocks) // world])
