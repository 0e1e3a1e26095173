"""Tiny models, tokenizers and preference records, made on the spot."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_infifpo.families import TINY

WORDS = """the a model prefers short clear answers because long vague ones waste time and two plus
three gives five while print writes text to the screen def return list number water earth sun moon
river mountain light sound never always maybe often red green blue open close read write""".split()
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # far from uniform, so that a misplaced weight shows
}


def config(family: str, **more: Any) -> Any:
    """Return the transformers configuration of a tiny model."""
    return AutoConfig.for_model(**{**SHAPE, **TINY[family], **more})


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer with a chat template of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def save_model(
    folder: Path, family: str, *, vocab_size: int = 320, seed: int = 0, **extra: Any
) -> Path:
    """Save a random model and its tokenizer as a Hugging Face folder, in float32."""
    torch.manual_seed(seed)
    # The padding id is one that no text has: transformers drops the gradient of its embedding.
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": vocab_size - 1}
    made = config(family, **{**ids, "vocab_size": vocab_size, **extra})
    model = AutoModelForCausalLM.from_config(made).float()
    # Norm weights and biases start at 1 and 0, where many mistakes cancel.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder, min(vocab_size, 300))
    return folder


def write_records(path: Path, count: int, seed: int = 0, *, pivot_chosen: bool = True) -> Path:
    """Write preference records of unequal length in two domains, for WRPO too by default."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            record = {
                "id": f"{path.stem}-{i}",
                "domain": "code" if i % 3 == 0 else "general",
                "prompt": text(2, 14),
                "chosen": text(1, 25) + " yes",
                "rejected": text(1, 25) + " no",
            }
            if pivot_chosen:
                record["pivot_chosen"] = text(1, 25) + " maybe"
            file.write(json.dumps(record) + "\n")
    return path
