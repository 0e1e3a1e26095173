"""A pivot and two sources that cut the same texts differently, and all commands over them."""

import copy
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_infifpo.gpu_check.tiny import WORDS
from support import tiny
from support.runs import steps_of
from support.token_oracle import Oracle, Teacher, conversations
from support.token_speakers import Speaker
from support.tools import run_command

ROLES = ("user", "assistant", "system", "tool")
TEMPLATE = (
    "{%% for m in messages %%}{{ '<|' + m['role'] + '|>' + %s + '<|end|>' }}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|assistant|>' }}{%% endif %%}"
)
TRIMS = "m['content'] | trim"
K = 6


def train_tokenizer(folder: Path, texts: Sequence[str], vocab_size: int, digits: str | None,
                    content: str = "m['content']") -> None:  # fmt: skip
    """Save a byte-level BPE; `digits` is what of a number is cut off first."""
    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if digits:
        steps.insert(0, pre_tokenizers.Split(Regex(digits), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", *(f"<|{role}|>" for role in ROLES)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
    )
    fast.chat_template = TEMPLATE % content
    fast.save_pretrained(folder)


def some_text(rng: random.Random, most: int = 9) -> str:
    """Words, numbers of many digits, punctuation, letters of several bytes, white space."""
    odd = ["ça", "日本", "🙂", "x=1,", "...", "\n", "a  b", "3.14", "naïve"]
    makers = [
        lambda: rng.choice(WORDS),
        lambda: rng.choice(WORDS),
        lambda: str(rng.randint(0, 99999)),
        lambda: rng.choice(odd),
    ]
    return " ".join(rng.choice(makers)() for _ in range(rng.randint(1, most))) + "."


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Pairs of one and several turns, with tools, with white space at the ends of some replies."""
    rng, lines = random.Random(seed), []
    for i in range(count):
        chosen: Any = some_text(rng)
        prompt: Any = some_text(rng)
        if i % 4 == 1:
            chosen = " " + chosen + " \n"
        if i % 4 == 2:
            prompt = said(rng, "user", "assistant", "user")
        if i % 4 == 3:
            chosen = said(rng, "assistant", "tool", "assistant")
        domain = "code" if i % 3 == 0 else "general"
        record = {"id": f"p-{i}", "domain": domain, "prompt": prompt}
        lines.append(record | {"chosen": chosen, "rejected": some_text(rng) + " no"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def said(rng: random.Random, *roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": some_text(rng)} for role in roles]


def write_lists(path: Path, count: int, seed: int = 1) -> Path:
    """Lists of two to four replies with scores."""
    rng, lines = random.Random(seed), []
    for i in range(count):
        replies = [some_text(rng) + f" {n}" for n in range(rng.randint(2, 4))]
        scores = [round(rng.uniform(-2, 2), 3) for _ in replies]
        domain = "code" if i % 3 == 0 else "general"
        record = {"id": f"l-{i}", "domain": domain, "prompt": some_text(rng)}
        lines.append(record | {"responses": replies, "scores": scores})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def renumber(source: Path, folder: Path, seed: int) -> None:
    """Copy a model, with another number for each id of its tokenizer."""
    shutil.copytree(source, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, added = content["model"]["vocab"], content["added_tokens"]
    size = 1 + max(vocabulary.values())
    numbers = list(range(size))
    random.Random(seed).shuffle(numbers)
    content["model"]["vocab"] = {text: numbers[old] for text, old in vocabulary.items()}
    for token in added:
        token["id"] = numbers[token["id"]]
    added.sort(key=lambda token: token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    weights = tiny.load_weights(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            rows = weights[name].clone()
            rows[torch.tensor(numbers)] = weights[name][:size]
            weights[name] = rows
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class Chain:
    """Models, records, and what the commands make of them.

    Attributes:
        speakers: the same models as the oracle has them.
    """

    def __init__(self, folder: Path, ranks: Any, count: int = 12) -> None:
        self.folder, self.ranks, self.count = folder, ranks, count
        rng = random.Random(5)
        texts = [some_text(rng, 30) for _ in range(300)]
        numbers = " ".join(str(rng.randint(0, 999)) for _ in range(800))
        tiny.save_model(folder / "hf", "llama", vocab_size=480, seed=1)
        train_tokenizer(folder / "hf", [*texts, numbers], 470, r"\d{1,3}")
        tiny.save_model(folder / "split", "qwen2", vocab_size=410, seed=2)
        train_tokenizer(folder / "split", [" ".join(WORDS[::2])] * 4 + texts[:40], 400, r"\d")
        tiny.save_model(folder / "coarse", "phi3", vocab_size=540, seed=3)
        train_tokenizer(folder / "coarse", texts[100:], 530, None, TRIMS)
        self.convert()
        self.records = {
            "pairs": write_pairs(folder / "pairs.jsonl", count),
            "lists": write_lists(folder / "lists.jsonl", count),
        }
        self.speakers = {
            name: Speaker(folder / name, trims=name == "coarse")
            for name in ("hf", "split", "coarse")
        }

    def convert(self) -> None:
        """Import the pivot."""
        argv = ["import", "--hf", str(self.folder / "hf"), "--save", str(self.folder / "pivot")]
        self.ranks(1, "support.tools:run_tool", "convert_checkpoint", argv)

    def renumbered(self, folder: Path) -> "Chain":
        """Return the same models with other numbers for their ids."""
        other = copy.copy(self)
        other.folder = folder
        for seed, name in enumerate(self.speakers):
            renumber(self.folder / name, folder / name, seed)
        other.convert()
        return other

    def score(self, model: str, records: str, output: Path, *more: str,
              backend: str = "transformers") -> Path:  # fmt: skip
        """Run `infifpo score`."""
        run_command(
            "score", "--backend", backend, "--model", str(self.folder / model), "--top-k", str(K),
            "--input", str(self.records[records]), "--output", str(output), *more,
        )  # fmt: skip
        return output

    def prepare(self, records: str, folder: Path, *more: str) -> None:
        """Run `infifpo prepare` and `infifpo score` for all models."""
        folder.mkdir(exist_ok=True)
        run_command(
            "prepare", "--input", str(self.records[records]), "--output", str(folder / "data"),
            "--tokenizer", str(self.folder / "hf"), *more,
        )  # fmt: skip
        for model, name in (("hf", "initial"), ("split", "split"), ("coarse", "coarse")):
            self.score(model, records, folder / name, *more)

    def fuse(self, folder: Path, output: str, entries: Sequence[str], *flags: str) -> Path:
        """Run `infifpo fuse-targets`."""
        sources = folder / f"{output}.yaml"
        lines = "".join(f"  - {entry}\n" for entry in entries)
        sources.write_text(f"initial: {{logprobs: initial, weight: 0.5}}\nsources:\n{lines}")
        run_command(
            "fuse-targets", "--data", str(folder / "data"), "--sources", str(sources),
            "--output", str(folder / output), *flags,
        )  # fmt: skip
        return folder / output

    def train(self, folder: Path, method: str, targets: Path, *flags: str,
              world: int = 1) -> dict[str, float]:  # fmt: skip
        """Return the metrics of the first step, of all records, and its gradient's norm."""
        argv = [
            "--preference-data", str(folder / "data"), "--pretrained-checkpoint",
            str(self.folder / "pivot"), "--method", method, "--soft-targets", str(targets),
            "--train-iters", "1", "--global-batch-size", str(self.count), "--lr", "1e-3",
            "--lr-decay-style", "constant", "--seq-length", "512", "--log-interval", "1",
            "--use-distributed-optimizer", *flags,
        ]  # fmt: skip
        if not any(flag.startswith("--micro-batch") for flag in flags):
            argv += ["--micro-batch-size", "2"]
        results = self.ranks(world, "support.training:train", argv)
        return steps_of(results)[0] | {"norm": results[0]["norms"][0]}

    def oracle(self, records: str, names: Sequence[str], *, weights: Sequence[float] = (),
               domains: dict[str, tuple[str, ...]] | None = None, **options) -> dict:  # fmt: skip
        """Compute the same without the program."""
        weights = weights or [1.0] * len(names)
        teachers = [
            Teacher(name, self.speakers["hf" if name == "initial" else name], weight,
                    (domains or {}).get(name))
            for name, weight in zip(names, weights, strict=True)
        ]  # fmt: skip
        oracle = Oracle(self.speakers["hf"], teachers, top_k=K, scored_k=K)
        for name, value in options.items():
            assert hasattr(oracle, name), name
            setattr(oracle, name, value)
        return oracle.first_loss(conversations(self.records[records.partition("-")[0]]))
