"""What the benchmarks in tools/ share: every run is a process of its own, runs alternate."""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_infifpo.errors import UserError
from megatron_infifpo.patches import cpu

if TYPE_CHECKING:  # who only measures does without Megatron
    from megatron_infifpo.records.records import PreferenceRecord
    from megatron_infifpo.tokens.dataset import TokenDataset
    from megatron_infifpo.tokens.tokenization import ChatTokenizer


def on_gpu() -> bool:
    """Whether this run computes on a GPU."""
    return torch.cuda.is_available() and not cpu.is_enabled()


def peak_mib() -> float:
    """Peak memory of this process so far: of the GPU where there is one, else resident."""
    if on_gpu():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(name: str, ranks: int = 1) -> dict[str, Any]:
    """Run this program again with `--only name`; its last line of output is JSON.

    Raises:
        UserError: it failed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), *sys.argv, "--only", name]
    environment = dict(os.environ)
    if not on_gpu():  # the CPU stand-ins cannot be compiled, and are loaded late here
        environment["TORCHDYNAMO_DISABLE"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def alternate(
    names: Sequence[str], rounds: int, ranks: Sequence[int] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Run every method in turn, so many times, on so many ranks; what each run returned."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, size in zip(names, ranks or [1] * len(names), strict=True):
            found[name].append(in_a_process(name, size))
            print(f"{name:<22}{found[name][-1]['seconds']:>9.2f} s", file=sys.stderr)
    return found


class Timer:
    """Seconds and peak memory of each step, and the rate of large products around it."""

    def __init__(self, bf16: bool) -> None:
        """Take the data type of the products."""
        size = 8192 if on_gpu() else 2048
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.factor = torch.ones(size, size, dtype=dtype, device="cuda" if on_gpu() else "cpu")
        self.seconds: list[float] = []
        self.peaks: list[float] = []
        self.held: list[float] = []
        self.kept = 0.0

    def __enter__(self) -> None:
        """Measure the machine, then start the clock."""
        self.peaks.append(self.rate())
        self._forget_peak()
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        """Stop the clock, then measure the machine."""
        if on_gpu():
            torch.cuda.synchronize()
            self.kept = torch.cuda.memory_allocated() / 2**20 - self._own_mib()
        self.seconds.append(time.perf_counter() - self.start)
        self.held.append(peak_mib() - self._own_mib())
        self.peaks.append(self.rate())
        self._forget_peak()

    def rate(self) -> float:
        """FLOP/s of large products, for about a second."""
        torch.mm(self.factor, self.factor)
        count, start = 64 if on_gpu() else 8, time.perf_counter()
        for _ in range(count):
            torch.mm(self.factor, self.factor)
        if on_gpu():
            torch.cuda.synchronize()
        return count * 2 * len(self.factor) ** 3 / (time.perf_counter() - start)

    def _forget_peak(self) -> None:
        if on_gpu():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def _own_mib(self) -> float:
        """What the factor of the products takes of the GPU."""
        return self.factor.nbytes / 2**20 if on_gpu() else 0.0

    def result(self) -> dict[str, float]:
        """Medians of all steps but the first, if there are others, and their peak memory.

        Returns:
            seconds and peak (FLOP/s of large products); mib: the most that a step held; kept_mib:
            what is left between steps, on a GPU; later_mib: the most held since the last step.
        """
        seconds = statistics.median(self.seconds[1:] or self.seconds)
        peak = statistics.median(self.peaks[2:] or self.peaks)
        memory = {"mib": max(self.held[1:] or self.held), "kept_mib": self.kept}
        later = peak_mib() - self._own_mib()
        return {"seconds": seconds, "peak": peak, "later_mib": later, **memory}


class KeptBytes:
    """Counts what a model's forward pass keeps for its backward pass, parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Take the model that will run inside."""
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> "KeptBytes":
        """Begin to count."""
        self._hooks.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        """Stop counting."""
        self._hooks.__exit__(*problem)

    @property
    def bytes(self) -> int:
        """All of them, each storage once."""
        return sum(self._storages.values())


def write_pairs(
    records: "Sequence[PreferenceRecord]",
    tokenizer: "ChatTokenizer",
    folder: Path,
    sources: int = 0,
) -> "TokenDataset":
    """Write records and log-probs of nobody for `training_steps`, by so many sources."""
    from megatron_infifpo.records.records import records_fingerprint
    from megatron_infifpo.references.logprob_writer import LogprobWriter
    from megatron_infifpo.tokens.dataset import TokenDataset
    from megatron_infifpo.tokens.writer import write_token_dataset

    write_token_dataset(records, tokenizer, folder / "pairs")
    data = TokenDataset(folder / "pairs")
    manifest: dict[str, Any] = dict.fromkeys(("model", "weights_sha256", "backend", "dtype"), "-")
    manifest |= {"records_sha256": records_fingerprint(records), "versions": {}}
    manifest["tokenizer"] = tokenizer.describe()
    names = [f"source-{i}" for i in range(sources)]
    for value, name in enumerate(["initial", *names], 2):
        with LogprobWriter(folder / name, responses=data.responses, manifest=manifest) as writer:
            for i, record in enumerate(records):
                writer.add(record.id, [np.full(n, -float(value)) for n in data.scored_lengths[i]])
    listed = [{"name": name, "logprobs": name} for name in names]
    (folder / "sources.yaml").write_text(json.dumps({"initial": "initial", "sources": listed}))
    return data


def recorded_training(
    argv: Sequence[str], timer: contextlib.AbstractContextManager[None] | None = None
) -> dict[str, list[float]]:
    """Run `infifpo train ARGV` in this process, once in its life.

    Args:
        argv: flags.
        timer: entered around every step of Megatron's loop.

    Returns:
        losses (on the last pipeline stage, else NaN) and norms of the gradient, by step.
    """
    from megatron_infifpo.training.run import RunConfig, train  # readies Megatron for the CPU
    import megatron.training.training as loop  # isort: skip

    record: dict[str, list[float]] = {"losses": [], "norms": []}
    original = loop.train_step

    def train_step(*arguments: Any, **options: Any) -> Any:
        with timer or contextlib.nullcontext():
            result = original(*arguments, **options)
        record["losses"].append(float(result[0].get("loss", torch.nan)))
        record["norms"].append(float(result[5]))
        return result

    loop.train_step = train_step
    try:
        train(RunConfig.from_arguments(argv))
    except SystemExit as stop:  # Megatron's --exit-interval
        if stop.code:
            raise
    return record


def training_flags(folder: Path, steps: int) -> list[str]:
    """Flags of DPO from `folder/pivot`, on what `write_pairs` wrote there."""
    return [
        "--method", "dpo", "--beta", "0.1", "--preference-data", str(folder / "pairs"),
        "--preference-sources", str(folder / "sources.yaml"), "--reference-check", "off",
        "--pretrained-checkpoint", str(folder / "pivot"), "--train-iters", str(steps),
        "--lr-decay-style", "constant",
    ]  # fmt: skip


def training_steps(folder: Path, timer: Timer, steps: int, *flags: str) -> list[float]:
    """Train from `folder/pivot` on what `write_pairs` wrote there; time Megatron's steps.

    Returns:
        The loss of each step, on the last pipeline stage.
    """
    argv = [*training_flags(folder, steps), "--lr", "1e-6", *flags]
    return recorded_training(argv, timer)["losses"]


def print_worst(result: dict[str, float]) -> None:
    """Print on rank 0, as JSON, the slowest and the largest that any rank has measured."""
    every = [result]
    if dist.is_initialized():
        every = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, result)
        if dist.get_rank():
            return
    print(json.dumps({name: max(one[name] for one in every) for name in result}))


def table(found: dict[str, list[dict[str, Any]]], peer: str, columns: dict[str, str]) -> None:
    """Print medians of seconds and memory, ratios to the peer, and other columns as they are.

    Args:
        found: results by method; each has seconds and mib.
        peer: the method that ratios are to.
        columns: title -> key of a result.
    """
    middle = {
        name: {k: statistics.median(run[k] for run in runs) for k in ("seconds", "mib")}
        for name, runs in found.items()
    }
    titles = "".join(f"{title:>14}" for title in columns)
    print(f"{'':<22}{'seconds':>9}{'speed-up':>10}{'MiB':>8}{'ratio':>7}{titles}")
    for name, runs in found.items():
        seconds, mib = middle[name]["seconds"], middle[name]["mib"]
        more = "".join(f"{statistics.median(r[k] for r in runs):>14.4g}" for k in columns.values())
        print(
            f"{name:<22}{seconds:>9.2f}{middle[peer]['seconds'] / seconds:>10.2f}"
            f"{mib:>8.0f}{mib / middle[peer]['mib']:>7.2f}{more}"
        )
