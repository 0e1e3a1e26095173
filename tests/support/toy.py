"""A pivot whose responses can be counted: strings over {a, b} of at most three letters.

Fifteen responses, two sources, one of them with another vocabulary, and rewards, so that the best
policy is known: `pi* = M exp(r / beta) / Z` over the responses, with M the weighted fusion.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_infifpo.records.records import PreferenceRecord, records_fingerprint, reply
from megatron_infifpo.references.logprob_writer import LogprobWriter
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from megatron_infifpo.tokens.writer import write_token_dataset
from support import tiny

RESPONSES = ["".join(s) for n in range(4) for s in itertools.product("ab", repeat=n)]
PROMPTS = ("p", "q")
BETA = 0.7
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
WEIGHTS = {"initial": 0.2, "letters": 0.3, "pairs": 0.5}
TEMPLATE = (
    "{% for m in messages %}{{ 'U' + m['content'] if m['role'] == 'user' else 'A' + m['content'] + "
    "'$' }}{% endfor %}{% if add_generation_prompt %}{{ 'A' }}{% endif %}"
)


def save_pivot(folder: Path) -> Path:
    """Save a tiny Llama that knows eight tokens, and gives all responses about equal odds."""
    letters = ["$", "a", "b", *PROMPTS, "U", "A", "-"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[])
    )
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="$")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(3)
    shape = SHAPE
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.1}
    ids = {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 7}
    config = tiny.config("llama", **shape, **heads, **ids)
    model = AutoModelForCausalLM.from_config(config).float()
    _even_out(model, ChatTokenizer(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def texts(chat: ChatTokenizer) -> list[list[tuple[int, torch.Tensor]]]:
    """Tokens of each response to each prompt, with the prompt's, and how many are the prompt's."""
    found = []
    for prompt in PROMPTS:
        message = ({"role": "user", "content": prompt},)
        record = PreferenceRecord("x", "toy", message, tuple(map(reply, RESPONSES)), listed=True)
        tokens = chat.encode(record)
        whole = [np.concatenate([tokens.prompt_ids, ids]) for ids in tokens.response_ids]
        found.append([(len(tokens.prompt_ids), torch.from_numpy(w).long()) for w in whole])
    return found


def _even_out(model: Any, chat: ChatTokenizer) -> None:
    """Train a model on all responses alike: a response that is never drawn teaches nothing."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(10):
        logprobs = [response_logprobs(model, *text) for row in texts(chat) for text in row]
        optimizer.zero_grad()
        (-torch.cat(logprobs).sum()).backward()
        optimizer.step()


def response_logprobs(model: Any, first: int, text: torch.Tensor) -> torch.Tensor:
    """Log-probs of a text's tokens from the first one on."""
    logits = model(text[None]).logits[0].double().log_softmax(-1)
    return logits[torch.arange(first - 1, len(text) - 1), text[first:]]


class Toy:
    """The pivot's responses, what models say of them, and the best policy.

    Attributes:
        hf: the pivot's folder.
        initial: float64 `[P, 15]`, log-probs of the responses to each prompt under the pivot.
        rewards: float64 `[P, 15]`.
        best: float64 `[P, 15]`, log-probs of the best policy, over these responses alone.
    """

    def __init__(self, hf: Path):
        self.hf, self.chat = hf, ChatTokenizer.from_pretrained(hf)
        rng = np.random.default_rng(5)
        self.tokens = {
            "letters": [[-rng.gamma(1.0, 0.6, len(y) + 1) for y in RESPONSES] for _ in PROMPTS],
            "pairs": [
                [-rng.gamma(1.0, 0.7, len(y.replace("ab", "c")) + 1) for y in RESPONSES]
                for _ in PROMPTS
            ],
            "initial": token_logprobs(hf, self.chat),
        }
        sums = {
            name: np.array([[values.sum(dtype=np.float64) for values in row] for row in rows])
            for name, rows in self.tokens.items()
        }
        self.initial = sums["initial"]
        self.rewards = rng.normal(0, 0.7, (len(PROMPTS), len(RESPONSES))).round(3)
        fused = sum(weight * sums[name] for name, weight in WEIGHTS.items())
        logits = torch.from_numpy(fused + self.rewards / BETA)
        self.best = logits.log_softmax(dim=1).numpy()

    def write(self, folder: Path, lists: Sequence[tuple[int, Sequence[int]]]) -> list[str]:
        """Write lists, each a prompt and responses by number, as data sets; return their flags."""
        folder.mkdir(parents=True)
        records = [
            PreferenceRecord(
                f"r-{number}",
                "toy",
                ({"role": "user", "content": PROMPTS[p]},),
                tuple(reply(RESPONSES[y]) for y in ys),
                tuple(float(self.rewards[p, y]) for y in ys),
                listed=True,
            )
            for number, (p, ys) in enumerate(lists)
        ]
        write_token_dataset(records, self.chat, folder / "tokens", source_files=["none"])
        for name, values in self.tokens.items():
            manifest = {
                "model": name,
                "weights_sha256": None,
                "tokenizer": self.chat.describe(),
                "records_sha256": records_fingerprint(records),
                "backend": "toy",
                "dtype": "float32",
                "versions": {},
            }
            widest = max(records, key=lambda record: len(record.responses)).names
            with LogprobWriter(folder / name, responses=widest, manifest=manifest) as writer:
                for record, (p, ys) in zip(records, lists, strict=True):
                    writer.add(record.id, [values[p][y] for y in ys])
        entries = [{"name": n, "logprobs": n, "weight": WEIGHTS[n]} for n in ("letters", "pairs")]
        initial = {"logprobs": "initial", "weight": WEIGHTS["initial"]}
        sources = folder / "sources.yaml"
        sources.write_text(json.dumps({"initial": initial, "sources": entries}))
        data = ["--preference-data", str(folder / "tokens"), "--preference-sources", str(sources)]
        return [*data, "--method", "fuserlhf", "--beta", str(BETA)]

    def policy(self, hf: Path) -> np.ndarray:
        """Log-probs `[P, 15]` of a model's responses, over these responses alone."""
        rows = token_logprobs(hf, self.chat)
        sums = [[values.sum(dtype=np.float64) for values in row] for row in rows]
        return torch.tensor(sums, dtype=torch.float64).log_softmax(dim=1).numpy()

    def distance(self, hf: Path) -> float:
        """KL of a model from the best policy, in nats: the larger one of the prompts'."""
        found = self.policy(hf)
        return float((np.exp(found) * (found - self.best)).sum(axis=1).max())


@torch.no_grad()
def token_logprobs(hf: Path, chat: ChatTokenizer) -> list[list[np.ndarray]]:
    """Log-probs of the tokens of each response to each prompt, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(hf).eval()
    return [
        [response_logprobs(model, *text).numpy().astype(np.float32) for text in row]
        for row in texts(chat)
    ]
