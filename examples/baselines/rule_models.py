"""The small models of the rule's language, each with a tokenizer and a chat template of its own."""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_infifpo.storage.aside import whole_folder

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "demo")]
import specialists  # noqa: E402
from specialists import Specialist  # noqa: E402

from examples.baselines.rule_language import Language, chats  # noqa: E402

CONTEXT = 128


@dataclass(frozen=True)
class Kind:
    """What makes a model: its tokenizer, and what it has learnt."""

    family: str
    vocab_size: int
    turn: str
    end: str
    digits: bool  # each is a token
    steps: int  # of training; 0: none
    rule: bool = True  # or another one, of the same words


KINDS = {
    "pivot": Kind("llama", 512, "<|ROLE|>", "<|end|>", digits=False, steps=250, rule=False),
    "source": Kind("phi3", 384, "[ROLE]", "</s>", digits=True, steps=350),
    "untrained": Kind("phi3", 384, "[ROLE]", "</s>", digits=True, steps=0),
}


def make(kind: Kind, language: Language, folder: Path, *, seed: int) -> Path:
    """Save a model as `folder`; one that does not know the rule knows another one."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(seed)
    known = language if kind.rule else Language(-1 - seed)
    texts = chats(known, 4000, f"{kind.family} {seed}")
    tokenizer = make_tokenizer(kind, texts)
    shape = {
        "vocab_size": kind.vocab_size, "hidden_size": 64, "intermediate_size": 192,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    if kind.family == "phi3":
        shape["original_max_position_embeddings"] = CONTEXT
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.family, **shape))
    if kind.steps:
        learn(model, *encode(kind, tokenizer, texts), steps=kind.steps, seed=seed)
    with whole_folder(folder) as aside:
        model.eval().save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return folder


def make_tokenizer(kind: Kind, texts: list[list[dict[str, str]]]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the texts."""
    before, after = kind.turn.split("ROLE")
    turns = {role: kind.turn.replace("ROLE", role) for role in ("user", "assistant")}
    turn = f"{{{{ '{before}' + m['role'] + '{after}' + m['content'] + '{kind.end}' }}}}"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    template += f"{{% if add_generation_prompt %}}{{{{ '{turns['assistant']}' }}}}{{% endif %}}"
    special = {"eos": kind.end, "pad": "<pad>", **turns}
    made = Specialist(
        "", kind.family, "", kind.vocab_size, special, template, steps=0, digits=kind.digits
    )
    tokenizer = specialists.train_tokenizer(made, texts)
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def encode(
    kind: Kind, tokenizer: PreTrainedTokenizerFast, texts: list[list[dict[str, str]]]
) -> tuple[Tensor, Tensor]:
    """Return ids and labels `[N, L]`: the answers are learnt, questions (-100) are not."""
    turns = {role: kind.turn.replace("ROLE", role) for role in ("user", "assistant")}
    whole = ["".join(turns[m["role"]] + m["content"] + kind.end for m in chat) for chat in texts]
    rows = tokenizer(whole, add_special_tokens=False).input_ids
    answer = tokenizer.convert_tokens_to_ids(turns["assistant"])
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        start = row.index(answer) + 1
        ids[index, : len(row)] = torch.tensor(row)
        labels[index, start : len(row)] = ids[index, start : len(row)]
    return ids, labels


def learn(model, ids: Tensor, labels: Tensor, *, steps: int, seed: int) -> None:
    """Train on 48 conversations a step."""
    rng, rate = random.Random(seed), 5e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        rows = torch.tensor(rng.sample(range(len(ids)), 48))
        logits = model(input_ids=ids[rows]).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[rows, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
