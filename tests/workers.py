"""What forked ranks run in tests; every function returns something picklable."""

import sys
from typing import Any

import torch


def head_gradients(seed: int, vocab: int, padded: int, dtype: str, chunk_bytes: int) -> dict:
    """Log-prob head over all ranks as one tensor-parallel group, and its gradients."""
    import torch.distributed as dist

    from megatron_infifpo.logprobs import vocab_parallel_logprobs

    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(seed)
    rows, hidden_size = 13, 16
    hidden = torch.randn(rows, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded, hidden_size, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator, dtype=torch.float64)
    world, rank = dist.get_world_size(), dist.get_rank()
    kind = getattr(torch, dtype)
    shard = weight.chunk(world)[rank].to(kind).requires_grad_()
    hidden = hidden.to(kind).requires_grad_()
    logprobs = vocab_parallel_logprobs(
        hidden, shard, targets, vocab_size=vocab, group=dist.group.WORLD, chunk_bytes=chunk_bytes
    )
    logprobs.backward(upstream.to(logprobs.dtype))
    dist.all_reduce(hidden.grad)
    return {
        "logprobs": logprobs.detach(),
        "hidden_grad": hidden.grad,
        "weight_grad": shard.grad,
    }


def train(argv: list[str]) -> dict[str, Any]:
    """Run `python -m megatron_infifpo.train ARGV` as one rank, and record what it computed.

    Returns the metrics of every step (on the last pipeline stage), gradient norms, evaluations.
    """
    import megatron.training.training as loop

    import megatron_infifpo.train as program

    record: dict[str, Any] = {"steps": [], "norms": [], "evaluations": []}
    original, evaluate = loop.train_step, loop.evaluate

    def train_step(*args, **kwargs):
        result = original(*args, **kwargs)
        record["steps"].append({k: v.item() for k, v in result[0].items()})
        record["norms"].append(float(result[5]))
        return result

    def evaluate_and_record(*args, **kwargs):
        result = evaluate(*args, **kwargs)
        record["evaluations"].append({k: float(v) for k, v in result[0].items()})
        return result

    loop.train_step, loop.evaluate = train_step, evaluate_and_record
    sys.argv = ["train", *argv]
    try:
        program.main()
    except SystemExit as stop:  # Megatron's --exit-interval
        if stop.code:
            raise
    return record


def score(argv: list[str]) -> None:
    """Run `python tools/score_source.py ARGV` as one rank."""
    run_tool("score_source", argv)


def export(checkpoint: str, folder: str) -> None:
    """Run `python tools/convert_checkpoint.py export` as one rank."""
    run_tool("convert_checkpoint", ["export", "--load", checkpoint, "--save", folder])


def load_tool(name: str):
    """Import a file in tools/."""
    import importlib.util
    from pathlib import Path

    path = Path(__file__).resolve().parent.parent / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(name: str, argv: list[str]) -> None:
    """Run the main of a file in tools/ as one rank."""
    sys.argv = [name, *argv]
    load_tool(name).main()


def command(program: str, argv: list[str]) -> None:
    """Run a program (a module, or tools/NAME.py) as its command line does, exit code included."""
    import importlib
    from pathlib import Path

    from megatron_infifpo.cli import run

    is_tool = program.startswith("tools/")
    module = load_tool(Path(program).stem) if is_tool else importlib.import_module(program)
    sys.argv = [program, *argv]
    run(module.main)


def megatron_logprobs(hf: str, rows: str, tp: int, pp: int) -> list[torch.Tensor] | None:
    """Log-probs of saved rows from the Megatron backend, on the rank that writes."""
    from megatron_infifpo.scoring.megatron_backend import MegatronBackend

    backend = MegatronBackend(hf, tensor_parallel=tp, pipeline_parallel=pp)
    output = backend(torch.load(rows))
    return output if backend.is_writer else None


def score_and_die(argv: list[str], shards: int) -> None:
    """Score like `score`, and stop dead after writing this many shards on a rank."""
    import os

    from megatron_infifpo.scoring.shards import ShardFolder

    write = ShardFolder.write
    written = []

    def write_and_count(self, shard, records):
        write(self, shard, records)
        written.append(shard)
        if len(written) == shards:
            os._exit(0)

    ShardFolder.write = write_and_count
    score(argv)
