#!/usr/bin/env python
"""Train the demo's two source models: small specialists with tokenizers of their own.

`generalist` is a Qwen2 model on all three domains, `coder` a Phi-3 model on code alone. Each has
its own vocabulary, special tokens and chat template, and takes about a minute on two CPU cores.
The command then shows on the held-out pairs that they are language models, if tiny ones: their
perplexity on the chosen responses is lower than on the rejected ones.

    python examples/demo/specialists.py --output outputs/demo/specialists
"""

import argparse
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
import training_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from megatron_infifpo.commands.entry import run
from megatron_infifpo.errors import UserError

SEED = 1234
CONTEXT = 1024  # positions of both models; longer than any pair of the demo


@dataclass(frozen=True)
class Specialist:
    """What makes one specialist; `template` must end every turn with `special_tokens["eos"]`."""

    name: str
    domains: tuple[str, ...]
    vocab_size: int
    special_tokens: dict[str, str]
    template: str
    steps: int


GENERALIST = Specialist(
    name="generalist",
    domains=("general", "math", "code"),
    vocab_size=3072,
    special_tokens={"pad": "<|pad|>", "eos": "<|turn|>", "system": "<|system|>"}
    | {"user": "<|user|>", "assistant": "<|assistant|>"},
    template=(
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] + '<|turn|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    steps=350,
)
CODER = Specialist(
    name="coder",
    domains=("code",),
    vocab_size=2048,
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
    steps=350,
)
SPECIALISTS = {specialist.name: specialist for specialist in (GENERALIST, CODER)}


def conversations(specialist: Specialist) -> list[list[dict[str, str]]]:
    """The specialist's training text as message lists: generated text and chosen responses."""
    rng = random.Random(SEED)
    examples = 2 * training_text.training_examples(specialist.domains)
    if "general" in specialist.domains:
        examples += training_text.general_examples(rng)
    if "math" in specialist.domains:
        examples += training_text.math_examples(rng, 600)
    if "code" in specialist.domains:
        examples += training_text.template_code_examples(
            rng, 200
        ) + training_text.stdlib_code_examples(700)
    chats = []
    for system, prompt, response in examples:
        chats.append([*messages(system, prompt), {"role": "assistant", "content": response}])
    return chats


def messages(system: str, prompt: str) -> list[dict[str, str]]:
    """The prompt as a message list, without a system message where there is none."""
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": prompt}]


def train_tokenizer(
    specialist: Specialist, chats: list[list[dict[str, str]]]
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `specialist.vocab_size` ids: special tokens first, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    if specialist is GENERALIST:
        # AutoTokenizer gives every qwen2 folder Qwen2's own pre-tokenizer, whatever was saved:
        # another one here would mean other ids after loading than in training.
        qwen2 = Qwen2Tokenizer().backend_tokenizer
        tokenizer.normalizer, tokenizer.pre_tokenizer = qwen2.normalizer, qwen2.pre_tokenizer
    else:
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=specialist.vocab_size,
        special_tokens=list(specialist.special_tokens.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((turn["content"] for chat in chats for turn in chat), trainer)
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
    shape = {
        "vocab_size": specialist.vocab_size,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if specialist.name == "coder":
        config = Phi3Config(**shape, original_max_position_embeddings=CONTEXT, rope_theta=10000.0)
        return Phi3ForCausalLM(config)
    return Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True, rope_theta=10000.0))


def train_specialist(
    name: str,
    output_dir: str | Path,
    *,
    steps: int | None = None,
    batch_size: int = 8,
    sequence_length: int = 160,
    learning_rate: float = 6e-3,
) -> Path:
    """Train specialist `name` ("generalist" or "coder"), save it as `output_dir/name`, return it.

    Next-token loss over whole conversations, laid end to end and cut into `sequence_length` tokens.
    Skipped when that folder is complete. Raises UserError for an unknown name.
    """
    if name not in SPECIALISTS:
        raise UserError(f"unknown specialist {name!r}: expected one of {', '.join(SPECIALISTS)}")
    specialist, output = SPECIALISTS[name], Path(output_dir) / name
    if (output / "config.json").exists():
        return output
    torch.manual_seed(SEED)
    chats = conversations(specialist)
    tokenizer = train_tokenizer(specialist, chats)
    model = build_model(specialist, tokenizer)
    encoded = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats]
    steps = specialist.steps if steps is None else steps

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.15)
    batches = _batches(encoded, batch_size, sequence_length)
    model.train()
    line = list(SPECIALISTS).index(name)  # two bars, when both train at once
    bar = tqdm(range(steps), desc=f"train {name}", unit="step", position=line)
    for _ in bar:
        ids = next(batches)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    partial = output.with_name(name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.eval().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(output)
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


def held_out_perplexity(folder: str | Path, domains: tuple[str, ...]) -> tuple[float, float, float]:
    """(perplexity of chosen, of rejected, share of pairs with chosen likelier).

    Per response the mean log-prob of its tokens, end of turn included, averaged over the held-out
    pairs of `domains`.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    mean_logps = []  # [pairs, 2]
    for system, prompt, *responses in training_text.pairs("heldout", domains):
        context = tokenizer.apply_chat_template(
            messages(system, prompt), add_generation_prompt=True, return_dict=False
        )
        row = []
        for response in responses:
            target = tokenizer(response, add_special_tokens=False).input_ids
            target.append(tokenizer.eos_token_id)
            with torch.no_grad():
                logits = model(torch.tensor([context + target])).logits[0, len(context) - 1 : -1]
            row.append(-F.cross_entropy(logits, torch.tensor(target)).item())
        mean_logps.append(row)
    chosen, rejected = torch.tensor(mean_logps).unbind(1)
    perplexities = (-chosen.mean()).exp().item(), (-rejected.mean()).exp().item()
    return *perplexities, (chosen > rejected).float().mean().item()


def train_all(output_dir: str | Path) -> dict[str, Path]:
    """Train every specialist that is not there yet, at once; returns name -> folder."""
    # They are too small for two threads each: a process each is faster.
    with ProcessPoolExecutor(len(SPECIALISTS), mp_context=get_context("spawn")) as pool:
        jobs = {name: pool.submit(_train_alone, name, output_dir) for name in SPECIALISTS}
        return {name: job.result() for name, job in jobs.items()}


def _train_alone(name: str, output_dir: str | Path) -> Path:
    torch.set_num_threads(1)
    return train_specialist(name, output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for the two models")
    for name, folder in train_all(parser.parse_args().output).items():
        chosen, rejected, share = held_out_perplexity(folder, SPECIALISTS[name].domains)
        print(
            f"{name}: {folder}, held-out perplexity {chosen:.1f} on chosen and {rejected:.1f} on "
            f"rejected responses; prefers chosen in {share:.0%} of the pairs of its domains"
        )


if __name__ == "__main__":
    run(main)
