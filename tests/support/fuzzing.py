"""Read damaged files: only a sentence for the user may come of it, quickly, in little memory.

    PYTHONPATH=.:tests python -m support.fuzzing --inputs 10000

Inputs are made from a seed and a number, so that a finding can be repeated: `--only READER
--first NUMBER --inputs 1`.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from support.damage import damage, damage_json
from support.readers import READERS, write_good_files

SECONDS = 20  # of one input
MEMORY = 2 << 30  # beyond what the process has
BATCH = 500  # inputs of a process


class SlowError(Exception):
    """An input took too long."""


def main() -> int:
    """Print a line a reader, and every finding; return 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10000, help="a reader (default: 10000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=READERS, nargs="+", default=list(READERS))
    args = parser.parse_args()
    findings = 0
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder) / "good"
        good.mkdir()
        write_good_files(good)
        for name in args.only:
            found, refused, seconds = fuzz(name, good, args.seed, args.first, args.inputs)
            print(
                f"{name:<20}{args.inputs:>7} inputs, {refused:>6} refused, {len(found)} findings, "
                f"{seconds:.0f} s",
                flush=True,
            )
            for text in found[:5]:
                print(text, flush=True)
            findings += len(found)
    return 1 if findings else 0


def fuzz(name: str, good: Path, seed: int, first: int, inputs: int) -> tuple[list[str], int, float]:
    """Read so many damaged inputs in processes of their own.

    Returns findings, how many inputs were refused, and seconds.
    """
    found: list[str] = []
    refused, start = 0, time.monotonic()
    number = first
    while number < first + inputs:
        count = min(BATCH, first + inputs - number)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _in_a_child(name, good, seed, number, count, writing)
        os.close(writing)
        with os.fdopen(reading, errors="replace") as lines:
            said = lines.read().splitlines()
        _, status = os.waitpid(pid, 0)
        done = [line for line in said if line.startswith("done ")]
        refused += sum(line == "refused" for line in said)
        found += [line.removeprefix("finding ") for line in said if line.startswith("finding ")]
        if status:
            at = number + len(done)
            found.append(f"{name} {at}: the process died (status {status})")
            number = at + 1
        else:
            number += count
    return found, refused, time.monotonic() - start


def _in_a_child(name: str, good: Path, seed: int, first: int, count: int, pipe: int) -> None:
    """Read a batch, then exit; says what came of each input."""
    with open("/proc/self/statm", encoding="ascii") as pages:
        used = int(pages.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, _too_slow)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    for number in range(first, first + count):
        os.write(pipe, (_outcome(name, good, seed, number) + f"\ndone {number}\n").encode())
    os._exit(0)


def _too_slow(*_: object) -> None:
    raise SlowError


def _outcome(name: str, good: Path, seed: int, number: int) -> str:
    reader, chance = READERS[name], random.Random(f"{seed} {name} {number}")
    folder = good.with_name(f"input-{os.getpid()}")
    shutil.copytree(good, folder, copy_function=os.link)
    victims = sorted(p for pattern in reader.files for p in folder.glob(pattern) if p.is_file())
    victim = chance.choice(victims)
    content = victim.read_bytes()
    victim.unlink()
    mutate = damage_json if reader.text else damage
    victim.write_bytes(mutate(content, chance))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    signal.alarm(SECONDS)
    try:
        reader.read(folder)
        result = "read"
    except ValueError as error:
        result = "refused" if str(error) else f"finding {name} {number}: no message"
    except BaseException as error:  # whatever it is, it is a finding
        where = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(where.filename).name}:{where.lineno}"
        text = " ".join(str(error).split())[:200]
        result = f"finding {name} {number}: {type(error).__name__} at {at}: {text}"
    finally:
        signal.alarm(0)
    if {p: p.stat().st_mtime_ns for p in folder.rglob("*")} != before:
        result = f"finding {name} {number}: it wrote something"
    shutil.rmtree(folder)
    return result


if __name__ == "__main__":
    sys.exit(main())
