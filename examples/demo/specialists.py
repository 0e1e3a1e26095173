"""Train the demo's two source models: small ones, with tokenizers of their own.

`trader` is a Qwen2 model that knows how the island trades, `host` a Phi-3 model that knows how it
feasts. Each has its own vocabulary, special tokens and chat template.
"""

import random
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from island import Chat, chats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.aside import whole_folder

SEED = 1234
CONTEXT = 1024  # positions of both models


@dataclass(frozen=True)
class Specialist:
    """What makes one specialist; `template` must end every turn with `special_tokens["eos"]`."""

    name: str
    family: str  # as transformers calls it
    knows: str  # a domain
    vocab_size: int
    special_tokens: dict[str, str]
    template: str
    steps: int
    layers: int = 2
    groups: int = 2  # of heads that share keys and values
    digits: bool = True  # each is a token


TRADER = Specialist(
    name="trader",
    family="qwen2",
    knows="trade",
    vocab_size=448,
    special_tokens={"pad": "<|pad|>", "eos": "<|turn|>", "system": "<|system|>"}
    | {"user": "<|user|>", "assistant": "<|assistant|>"},
    template=(
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] + '<|turn|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    steps=450,
)
HOST = Specialist(
    name="host",
    family="phi3",
    knows="feasts",
    vocab_size=384,
    special_tokens={
        "pad": "<pad>",
        "bos": "<s>",
        "eos": "</s>",
        "open": "[ASK]",
        "close": "[REPLY]",
    },
    template=(
        "{{ '<s>' }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ '# ' + message['content'] + '\n' }}"
        "{% elif message['role'] == 'user' %}{{ '[ASK]' + message['content'] + '[REPLY]' }}"
        "{% else %}{{ message['content'] + '</s>' }}{% endif %}"
        "{% endfor %}"
    ),
    steps=450,
)
SPECIALISTS = {specialist.name: specialist for specialist in (TRADER, HOST)}


def train_tokenizer(specialist: Specialist, texts: list[Chat]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `specialist.vocab_size` ids, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    if specialist.family == "qwen2":
        # AutoTokenizer gives every qwen2 folder Qwen2's own pre-tokenizer, whatever was saved:
        # another one here would mean other ids after loading than in training.
        qwen2 = Qwen2Tokenizer().backend_tokenizer
        tokenizer.normalizer, tokenizer.pre_tokenizer = qwen2.normalizer, qwen2.pre_tokenizer
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if specialist.digits else []
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=specialist.vocab_size,
        special_tokens=list(specialist.special_tokens.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((turn["content"] for chat in texts for turn in chat), trainer)
    special = specialist.special_tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special["pad"],
        unk_token=special["pad"],  # unused by byte-level BPE; unset, Qwen2 would add an id for it
        eos_token=special["eos"],
        bos_token=special.get("bos"),
        chat_template=specialist.template,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(specialist: Specialist, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained model of about 1 million parameters; heads and widths allow TP 1 and 2."""
    shape: dict[str, Any] = {
        "vocab_size": specialist.vocab_size,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": specialist.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": specialist.groups,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    if specialist.family == "phi3":
        shape["original_max_position_embeddings"] = CONTEXT
    config = AutoConfig.for_model(specialist.family, **shape)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train_specialist(
    name: str,
    output_dir: str | Path,
    *,
    steps: int | None = None,
    batch_size: int = 8,
    sequence_length: int = 128,
    learning_rate: float = 6e-3,
) -> Path:
    """Train specialist `name` ("trader" or "host") as `make` does, as `output_dir/name`.

    Raises UserError for an unknown name.
    """
    if name not in SPECIALISTS:
        raise UserError(f"unknown specialist {name!r}: expected one of {', '.join(SPECIALISTS)}")
    specialist = SPECIALISTS[name]
    return make(
        specialist if steps is None else replace(specialist, steps=steps),
        Path(output_dir) / name,
        lambda: list(chats(specialist.knows)),
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        line=list(SPECIALISTS).index(name),
    )


def make(
    specialist: Specialist,
    output: Path,
    texts: Callable[[], list[Chat]],
    *,
    batch_size: int,
    sequence_length: int,
    learning_rate: float,
    line: int,
) -> Path:
    """Train a model on what `texts` returns, save it as `output`, return that.

    Next-token loss over whole conversations, laid end to end and cut into `sequence_length` tokens.
    Skipped when that folder is complete. `line` is that of its bar, where several train at once.
    """
    if (output / "config.json").exists():
        return output
    torch.manual_seed(SEED)
    read = texts()
    tokenizer = train_tokenizer(specialist, read)
    model = build_model(specialist, tokenizer)
    encoded = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in read]

    steps = specialist.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.15)
    batches = _batches(encoded, batch_size, sequence_length)
    model.train()
    bar = tqdm(range(steps), desc=f"train {specialist.name}", unit="step", position=line)
    for _ in bar:
        ids = next(batches)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    with whole_folder(output) as aside:
        model.eval().save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return output


def _batches(encoded: list[list[int]], batch_size: int, length: int) -> Iterator[torch.Tensor]:
    """Endless [batch_size, length] id tensors; every pass shuffles the conversations anew."""
    rng, size = random.Random(SEED), batch_size * length
    stream: list[int] = []
    while True:
        while len(stream) < size:
            for chat in rng.sample(encoded, len(encoded)):
                stream.extend(chat)
        yield torch.tensor(stream[:size]).view(batch_size, length)
        stream = stream[size:]


def train_all(output_dir: str | Path) -> dict[str, Path]:
    """Train every specialist that is not there yet, at once; returns name -> folder."""
    return at_once(train_specialist, SPECIALISTS, output_dir)


def at_once(
    train: Callable[[str, str | Path], Path], names: Collection[str], output_dir: str | Path
) -> dict[str, Path]:
    """Train models in a process each; returns name -> folder."""
    # They are too small for two threads each: a process each is faster.
    spawn, limit = get_context("spawn"), torch.set_num_threads
    with ProcessPoolExecutor(len(names), spawn, initializer=limit, initargs=(1,)) as pool:
        jobs = {name: pool.submit(train, name, output_dir) for name in names}
        return {name: job.result() for name, job in jobs.items()}
