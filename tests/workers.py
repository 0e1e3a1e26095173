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
    upstream = upstream.to(logprobs.dtype)
    first = torch.autograd.grad(logprobs, (hidden, shard), upstream, retain_graph=True)
    logprobs.backward(upstream)
    again = [(a - b.grad).abs().max().item() for a, b in zip(first, (hidden, shard), strict=True)]
    dist.all_reduce(hidden.grad)
    return {
        "again": max(again),
        "logprobs": logprobs.detach(),
        "hidden_grad": hidden.grad,
        "weight_grad": shard.grad,
    }


def whole_loss_gradients(name: str, options: dict) -> list[tuple[float, float]]:
    """From hidden states over the head, sums, fusion and loss: gradients and finite differences.

    Float64, the vocabulary split over all ranks; (autograd, central difference) at some entries.
    """
    import torch.distributed as dist

    from megatron_infifpo.logprobs import segment_sums, vocab_parallel_logprobs
    from megatron_infifpo.methods import resolve
    from megatron_infifpo.training.objective import pair_losses

    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(17)
    method, pairs, vocab = resolve(name, **options), 3, 12
    counts = torch.tensor([[2, 3, 1], [1, 1, 4], [5, 2, 2]])[:, : method.responses]
    tokens = int(counts.sum())

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = random(tokens, 6) - 0.5, 3 * (random(vocab, 6) - 0.5)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    segment_ids = torch.arange(counts.numel()).repeat_interleave(counts.flatten())
    row = {
        "token_counts": counts,
        "initial_sum_logps": -3 * random(*counts.shape) * counts,
        "source_sum_logps": -5 * random(*counts.shape, 3) * counts[..., None],
        "source_token_counts": counts[..., None].expand(-1, -1, 3),
        "source_mask": torch.tensor([[True] * 3, [True, False, True], [False] * 3]),
    }
    world, rank = dist.get_world_size(), dist.get_rank()

    def loss(hidden: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
        logprobs = vocab_parallel_logprobs(
            hidden, shard, targets, vocab_size=vocab, group=dist.group.WORLD
        )
        sums = segment_sums(logprobs, segment_ids, counts.numel()).view(pairs, -1)
        return pair_losses(method, row, sums, progress=0.5)[0].sum()

    parts = hidden.clone().requires_grad_(), weight.chunk(world)[rank].clone().requires_grad_()
    loss(*parts).backward()
    dist.all_reduce(parts[0].grad)
    weight_grad = [torch.empty_like(parts[1].grad) for _ in range(world)]
    dist.all_gather(weight_grad, parts[1].grad)
    results = []
    for tensor, grad in ((hidden, parts[0].grad), (weight, torch.cat(weight_grad))):
        for index in range(0, tensor.numel(), 5):
            ends, original = [], tensor.view(-1)[index].item()
            for sign in (1, -1):
                tensor.view(-1)[index] = original + sign * 1e-6
                ends.append(loss(hidden, weight.chunk(world)[rank]).item())
            tensor.view(-1)[index] = original
            results.append((grad.reshape(-1)[index].item(), (ends[0] - ends[1]) / 2e-6))
    return results


def train(argv: list[str]) -> dict[str, Any]:
    """Run `python -m megatron_infifpo.train ARGV` as one rank, and record what it computed.

    Returns the metrics of every step (on the last pipeline stage), gradient norms, learning rates,
    evaluations.
    """
    import megatron.training.training as loop

    import megatron_infifpo.training.run as program

    record: dict[str, Any] = {"steps": [], "norms": [], "rates": [], "evaluations": []}
    original, evaluate = loop.train_step, loop.evaluate

    def train_step(*args, **kwargs):
        record["rates"].append(args[3].param_groups[0]["lr"])
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


def kept_bytes(argv: list[str]) -> dict[str, float]:
    """Train one step, and count what the layers' forward pass keeps for the backward pass.

    Returns bytes of the largest row's saved tensors, parameters left out, and that row's tokens.
    """
    import megatron_infifpo.training.run  # noqa: F401  (readies Megatron for the CPU)
    import megatron_infifpo.training.step as step

    found: dict[str, float] = {"tokens": 0.0}
    original = step.run_packed

    def run_packed(model, row, vocab_size):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = original(model, row, vocab_size)
        if row["tokens"].numel() > found["tokens"]:
            found.update(tokens=row["tokens"].numel(), kept=sum(kept.values()))
            found["keys"] = row["key_rows"].numel() if "key_rows" in row else found["tokens"]
        return output

    step.run_packed = run_packed
    train([*argv, "--train-iters", "1"])
    return found


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

    from megatron_infifpo.commands.entry import run

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


def score_jobs(jobs: list[list[str]]) -> None:
    """Score several models one after the other, at one layout."""
    for argv in jobs:
        score(argv)


def score_until_killed(argv: list[str], rank: int, point: str, seconds: float) -> None:
    """Score, but `kill -9` a rank so many seconds after the scoring, or the merge, has begun."""
    import os
    import signal
    import threading

    import megatron_infifpo.scoring.merge as merging
    import megatron_infifpo.scoring.score as module

    def start() -> None:
        if int(os.environ["RANK"]) == rank:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    class Progress(module.Progress):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if point == "scoring":
                start()

    class LogprobWriter(merging.LogprobWriter):
        def __init__(self, *args, **kwargs):
            start()
            super().__init__(*args, **kwargs)

    module.Progress = Progress
    if point == "merging":
        merging.LogprobWriter = LogprobWriter
    score(argv)


def score_while_the_input_shrinks(argv: list[str], lines: int, moment: str) -> None:
    """Score, but shorten the records once they have been looked through, or scored."""
    import os
    from pathlib import Path

    import megatron_infifpo.scoring.score as module

    records = Path(argv[argv.index("--input") + 1])
    shorter = records.with_name(f"{os.environ['RANK']}.tmp")
    name = {"scoring": "prefetch", "merging": "merge"}[moment]
    original = getattr(module, name)

    def shrink(*args):
        whole = records.read_text()
        shorter.write_text("".join(whole.splitlines(keepends=True)[:lines]))
        shorter.replace(records)  # at once: another rank must not find it empty
        return original(*args)

    setattr(module, name, shrink)
    command("tools/score_source.py", argv)


def score_on_a_full_disk(argv: list[str], limit: int) -> None:
    """Score with files limited to so many bytes, which fails as a full disk does."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    command("tools/score_source.py", argv)


def train_until_killed(
    argv: list[str], losses: str, rank: int, point: str, count: int, seconds: float
) -> None:
    """Train, but `kill -9` a rank so many seconds after its so-manieth step, or save, has begun.

    Appends a line `step loss` to the file `losses` after every step.
    """
    import os
    import signal
    import threading

    import megatron.training.training as loop
    from megatron.training import get_args

    left = [count]

    def begin(here: str) -> None:
        left[0] -= here == point
        if here == point and left[0] == 0 and int(os.environ["RANK"]) == rank:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    train_step, save = loop.train_step, loop.save_checkpoint

    def step_and_tell(*args, **kwargs):
        begin("step")
        result = train_step(*args, **kwargs)
        if result[0]:
            line = f"{get_args().curr_iteration + 1} {result[0]['loss'].item()!r}\n"
            with open(losses, "a", encoding="ascii") as file:
                file.write(line)
        return result

    def save_and_tell(*args, **kwargs):
        begin("save")
        return save(*args, **kwargs)

    loop.train_step, loop.save_checkpoint = step_and_tell, save_and_tell
    train(argv)


def train_on_a_full_disk(argv: list[str], limit: int) -> None:
    """Train with files limited to so many bytes, which fails as a full disk does."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    command("megatron_infifpo.train", argv)


def train_with_a_bad_step(argv: list[str], step: int, what: str) -> None:
    """Train, but make a weight of the pivot, or a gradient, NaN before that step."""
    import megatron.training.training as loop

    import megatron_infifpo.training.step as steps

    seen = [0]
    original, run_packed = loop.train_step, steps.run_packed

    def train_step(forward_step, data, model, *args, **kwargs):
        seen[0] += 1
        if seen[0] == step and what == "weight":
            with torch.no_grad():
                next(model[0].parameters())[0] = float("nan")
        return original(forward_step, data, model, *args, **kwargs)

    def spoiled(*args):
        output = run_packed(*args)
        if seen[0] == step and what == "gradient" and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output

    loop.train_step, steps.run_packed = train_step, spoiled
    command("megatron_infifpo.train", argv)
