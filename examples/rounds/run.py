#!/usr/bin/env python
"""Three rounds on a policy's own samples, on two cores: a reward that a program gives, and rises.

A small pivot answers everyday questions, eight times each. A program judges the answers, the given
pivot and a source with another tokenizer score them, FuseRLHF trains, and the next round samples
from what came of it. All that runs is `infifpo rounds`, whose command line is printed; give this
command again after an interruption.

    python examples/rounds/run.py                            # a few minutes
    python examples/rounds/run.py --method infifpo --output runs/iterated   # iterated InfiFPO
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_infifpo.commands.entry import run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
import specialists  # noqa: E402
from specialists import Specialist  # noqa: E402

HERE = Path(__file__).resolve().parent
# Rewards lie between 0 and 1, so a KL of one nat costs as much as a tenth of all that is to gain.
METHODS = {
    "fuserlhf": ["--beta", "0.1"],
    "infifpo": ["--beta", "2.5"],
    "pad": ["--beta", "10"],
}


def small(name: str, family: str, vocab_size: int, turn: str, end: str) -> Specialist:
    """A model of two layers; each turn of its template begins with `turn`, ends with `end`."""
    before, after = turn.split("ROLE")
    begin = f"{{{{ '{before}' + m['role'] + '{after}' + m['content'] + '{end}' }}}}"
    turns = {role: turn.replace("ROLE", role) for role in ("user", "assistant")}
    template = f"{{% for m in messages %}}{begin}{{% endfor %}}"
    template += f"{{% if add_generation_prompt %}}{{{{ '{turns['assistant']}' }}}}{{% endif %}}"
    special = {"eos": end, "pad": "<pad>", **turns}
    return Specialist(
        name, family, "", vocab_size, special, template, steps=150, layers=2, groups=4,
        digits=False,
    )  # fmt: skip


MODELS = {
    "pivot": small("pivot", "llama", 1024, "<|ROLE|>", "<|end|>"),
    "source": small("source", "phi3", 768, "[ROLE]", "</s>"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/rounds"), help="folder")
    parser.add_argument("--method", choices=METHODS, default="fuserlhf")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="delete the folder first")
    args, more = parser.parse_known_args()
    if args.fresh:
        shutil.rmtree(args.output, ignore_errors=True)
    started = time.monotonic()
    folders = specialists.at_once(save, MODELS, args.output / "models")
    print(f"{time.monotonic() - started:4.0f} s  the models are in {args.output / 'models'}")
    prompts, sources = write_inputs(args.output, folders["source"])
    training = ["--lr", "3e-4", "--global-batch-size", "32", "--micro-batch-tokens", "4096"]
    training += ["--seq-length", "256", "--clip-grad", "1.0", "--weight-decay", "0.0"]
    words = [
        "rounds", "--output", args.output / "rounds", "--pivot", folders["pivot"],
        "--prompts", prompts, "--sources", sources, "--method", args.method,
        "--rounds", args.rounds, "--steps", 8, "--round-prompts", 64, "--count", 8,
        "--sample-options", "--max-tokens 64 --batch 64",
        "--train-options", shlex.join([*training, *METHODS[args.method]]), *more,
    ]  # fmt: skip
    if args.method != "pad":
        words += ["--label-options", f"--program {HERE / 'judge.py'}:brief"]
    words = [str(word) for word in words]
    print("$", shlex.join(["infifpo", *words]), flush=True)
    # What is missing on a CPU is warned about by every library, in every process.
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "megatron_infifpo", *words]
    before = signal.signal(signal.SIGINT, lambda *_: None)  # the rounds stop and say where
    code = subprocess.run(command, env=quiet).returncode
    signal.signal(signal.SIGINT, before)
    print(f"{time.monotonic() - started:4.0f} s  done")
    return code


def write_inputs(folder: Path, source: Path) -> tuple[Path, Path]:
    """Write the pool of prompts and sources.yaml; return both."""
    prompts, sources = folder / "prompts.jsonl", folder / "sources.yaml"
    questions = dict.fromkeys(chat[0]["content"] for chat in chats())
    lines = [json.dumps({"id": f"q{i}", "prompt": text}) for i, text in enumerate(questions)]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sources.write_text(
        "initial: {logprobs: logprobs/initial, weight: 0.5}\n"
        "sources:\n"
        "  - name: source\n"
        "    logprobs: logprobs/source\n"
        "    weight: 0.5\n"
        f"    score: {{model: {json.dumps(str(source))}, backend: transformers}}\n",
        encoding="utf-8",
    )
    return prompts, sources


def chats() -> list[list[dict[str, str]]]:
    """Everyday questions with their answers."""
    lines = (HERE / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        [
            {"role": "user", "content": one["prompt"]},
            {"role": "assistant", "content": one["response"]},
        ]
        for one in map(json.loads, lines)
    ]


def save(name: str, folder: str | Path) -> Path:
    """Train one model unless its folder is there."""
    return specialists.make(
        MODELS[name], Path(folder) / name, chats, line=list(MODELS).index(name),
        batch_size=16, sequence_length=96, learning_rate=5e-3,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
