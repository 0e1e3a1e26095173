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
import random
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_infifpo.commands.entry import run
from megatron_infifpo.storage.aside import whole_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
import training_text  # noqa: E402

SEED, CONTEXT = 1234, 512
BATCH, LENGTH, RATE = 16, 96, 5e-3

HERE = Path(__file__).resolve().parent
# Rewards lie between 0 and 1, so a KL of one nat costs as much as a tenth of all that is to gain.
METHODS = {
    "fuserlhf": ["--beta", "0.1"],
    "infifpo": ["--beta", "2.5"],
    "pad": ["--beta", "10"],
}


@dataclass(frozen=True)
class Small:
    """A model of so many tokens; each turn of its template begins with `turn`, ends with `end`."""

    family: str
    vocab_size: int
    turn: str
    end: str
    steps: int

    @property
    def template(self) -> str:
        """A chat template."""
        before, after = self.turn.split("ROLE")
        begin = f"{{{{ '{before}' + m['role'] + '{after}' + m['content'] + '{self.end}' }}}}"
        answer = self.turn.replace("ROLE", "assistant")
        return (
            f"{{% for m in messages %}}{begin}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ '{answer}' }}}}{{% endif %}}"
        )


MODELS = {
    "pivot": Small("llama", 1024, "<|ROLE|>", "<|end|>", steps=150),
    "source": Small("phi3", 768, "[ROLE]", "</s>", steps=150),
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
    folders = save_all(args.output / "models")
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
    code = subprocess.run(command, env=quiet).returncode
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
    found = training_text.general_examples(random.Random(SEED))
    found += training_text.training_examples(("general",))
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for _, prompt, answer in found
    ]


def save_all(folder: Path) -> dict[str, Path]:
    """Train those that are not there yet, at once; returns name -> folder."""
    # They are too small for two threads each: a process each is faster.
    spawn, limit = get_context("spawn"), torch.set_num_threads
    with ProcessPoolExecutor(len(MODELS), spawn, initializer=limit, initargs=(1,)) as pool:
        jobs = {name: pool.submit(save, name, folder / name) for name in MODELS}
        return {name: job.result() for name, job in jobs.items()}


def save(name: str, folder: Path) -> Path:
    """Train one model unless its folder is there."""
    if folder.exists():
        return folder
    torch.manual_seed(SEED)
    small, texts = MODELS[name], chats()
    tokenizer = train_tokenizer(small, texts)
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape: dict[str, Any] = {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": CONTEXT,
        "vocab_size": small.vocab_size, "pad_token_id": tokenizer.pad_token_id, **ids,
    }  # fmt: skip
    shape |= {"original_max_position_embeddings": CONTEXT} if small.family == "phi3" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(small.family, **shape)).float()
    encoded = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in texts]
    train(model, encoded, small.steps)
    with whole_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return folder


def train_tokenizer(small: Small, texts: list[list[dict[str, str]]]) -> PreTrainedTokenizerFast:
    """A byte-level BPE, special tokens first."""
    special = [small.end, "<pad>", *(small.turn.replace("ROLE", r) for r in ("user", "assistant"))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=small.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((turn["content"] for chat in texts for turn in chat), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=small.end,
        pad_token="<pad>",
        chat_template=small.template,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def train(model: torch.nn.Module, encoded: list[list[int]], steps: int) -> None:
    """Next-token loss over conversations laid end to end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.15)
    rng, stream, size = random.Random(SEED), list[int](), BATCH * LENGTH
    for _ in range(steps):
        while len(stream) < size:
            for chat in rng.sample(encoded, len(encoded)):
                stream += chat
        ids, stream = torch.tensor(stream[:size]).view(BATCH, LENGTH), stream[size:]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


if __name__ == "__main__":
    run(main)
