"""The models of the study: small ones of real families, with tokenizers that differ in kind.

What a model knows is drawn anew for every set of models: of each cell (domain and village) it knows
the right form, is unsure, or believes the wrong one, and its pretraining text says so.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Tokenizer

from megatron_infifpo.storage.aside import whole_folder
from megatron_infifpo.study.world import DOMAINS, VILLAGES, Question, draw

CONTEXT = 64
KNOWN, UNSURE, WRONG = 0.92, 0.5, 0.1
"""How often the pretraining text gives the right answer in such a cell."""


@dataclass(frozen=True)
class Kind:
    """A model, before it is drawn.

    Attributes:
        family: as transformers calls it.
        pieces: how its tokenizer cuts text, see `make_tokenizer`.
        known, wrong: shares of the cells of its domains; it is unsure of the rest.
        domains: what it was pretrained on.
        width, layers: its size.
    """

    family: str
    pieces: str
    known: float
    wrong: float
    domains: tuple[str, ...] = DOMAINS
    width: int = 96
    layers: int = 3


KINDS = {
    "pivot": Kind("llama", "characters", 0.3, 0.3, width=64),
    "big-pivot": Kind("llama", "characters", 0.3, 0.3, width=128, layers=4),
    "generalist": Kind("qwen2", "merges", 0.55, 0.2),
    "neighbour": Kind("mistral", "left pairs", 0.5, 0.2),
    "sums-expert": Kind("phi3", "right pairs", 0.9, 0.03, ("sums",)),
    "turns-expert": Kind("gemma3_text", "unigram", 0.9, 0.03, ("turns",)),
    "bad": Kind("llama", "merges", 0.15, 0.6),
    "equal-1": Kind("qwen2", "merges", 0.3, 0.3),
    "equal-2": Kind("mistral", "left pairs", 0.3, 0.3),
    "worse-1": Kind("qwen2", "merges", 0.15, 0.45),
    "worse-2": Kind("mistral", "left pairs", 0.15, 0.45),
    "adversary": Kind("qwen2", "merges", 0.0, 0.95),
}
_SPLITS = {
    "left pairs": r"\s?\w{1,2}|[^\w\s]+|\s+",
    "right pairs": r"\s?\w(?=(\w\w)*\b)|\w\w|[^\w\s]+|\s+",
}


def beliefs(name: str, of_set: int) -> dict[tuple[str, str], float]:
    """How often a model's pretraining text is right, by cell of its domains."""
    kind, rng = KINDS[name], random.Random(f"beliefs {name.removeprefix('big-')} {of_set}")
    found = {}
    for domain in kind.domains:
        for village in VILLAGES[domain]:
            share = rng.random()
            unsure = UNSURE if share < 1 - kind.wrong else WRONG
            found[domain, village] = KNOWN if share < kind.known else unsure
    return found


def pretraining_text(name: str, of_set: int, count: int) -> Iterator[tuple[Question, str, str]]:
    """Questions, the answer that the model's text gives, and the one that it does not give."""
    held, rng = beliefs(name, of_set), random.Random(f"answers {name} {of_set}")
    for question in draw("pretraining", count, f"{name} {of_set}", KINDS[name].domains):
        right = rng.random() < held[question.domain, question.village]
        both = (question.right, question.other)
        yield question, *(both if right else both[::-1])


def save_untrained(name: str, of_set: int, folder: Path) -> Path:
    """Save a random model with its tokenizer."""
    kind = KINDS[name]
    digest = hashlib.sha256(f"{name} {of_set}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:4]))
    tokenizer = make_tokenizer(kind)
    with whole_folder(folder) as aside:
        AutoModelForCausalLM.from_config(_config(kind, tokenizer)).save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return folder


def _config(kind: Kind, tokenizer: PreTrainedTokenizerFast) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": kind.width,
        "intermediate_size": 2 * kind.width, "num_hidden_layers": kind.layers,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": kind.width // 4, "max_position_embeddings": CONTEXT,
        "initializer_range": 0.05, "tie_word_embeddings": kind.family == "gemma3_text",
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    if kind.family == "phi3":
        shape["original_max_position_embeddings"] = CONTEXT
    if kind.family == "gemma3_text":
        shape |= {"query_pre_attn_scalar": kind.width // 4, "sliding_window": CONTEXT}
    return AutoConfig.for_model(kind.family, **shape)


def make_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template of the family's own.

    characters: a token each; merges: a byte-level BPE; left pairs and right pairs: words are cut
    into pairs from the left or from the right; unigram: pieces by likelihood.
    """
    opens, ends = (
        {"llama": "<|ROLE|>", "phi3": "<|ROLE|>\n", "mistral": "[ROLE]"}.get(
            kind.family, "<start_of_ROLE>"
        ),
        {"mistral": "</s>", "phi3": "<|end|>"}.get(kind.family, "<|im_end|>"),
    )
    turns = [opens.replace("ROLE", role) for role in ("user", "assistant")]
    tokenizer = Tokenizer(models.Unigram() if kind.pieces == "unigram" else models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.pieces == "merges")
    split = _SPLITS.get(kind.pieces)
    steps = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_])
    if kind.family == "qwen2":  # AutoTokenizer gives every qwen2 folder Qwen2's own pre-tokenizer
        own = Qwen2Tokenizer().backend_tokenizer
        tokenizer.normalizer, tokenizer.pre_tokenizer = own.normalizer, own.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    how: dict[str, Any] = {
        "special_tokens": ["<pad>", ends, *(turn.strip() for turn in turns)],
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False,
        "vocab_size": 260 if kind.pieces == "characters" else 420,
    }  # fmt: skip
    trainer = (
        trainers.UnigramTrainer(**how) if kind.pieces == "unigram" else trainers.BpeTrainer(**how)
    )
    texts = draw("pretraining", 3000, "tokenizer")
    tokenizer.train_from_iterator((f"{q.text} {q.right} {q.other}" for q in texts), trainer)
    template = "{% for m in messages %}" + _turn(opens, ends) + "{% endfor %}"
    template += f"{{% if add_generation_prompt %}}{{{{ {turns[1]!r} }}}}{{% endif %}}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>", eos_token=ends,
        chat_template=template, model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _turn(opens: str, ends: str) -> str:
    before, after = opens.split("ROLE")
    return f"{{{{ {before!r} + m['role'] + {after!r} + m['content'] + {ends!r} }}}}"
