"""Check the most probable tokens beside one model's log-probs, value by value."""

from collections.abc import Iterator

import numpy as np

from megatron_infifpo.checks.faults import MASS, Rule, check_rules, twice
from megatron_infifpo.records.records import PreferenceRecord
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.scoring.top_k import Text, TopKeeper
from megatron_infifpo.tokens.encoding import scored_marks
from megatron_infifpo.tokens.tokenization import ChatTokenizer, TokenizedRecord

# How far a log-prob may be from the same one in float16: relatively, and on its own.
_HALF, _EQUAL = 2.0**-10, 2e-3


def check_top_k(
    store: LogprobStore,
    tokenizer: ChatTokenizer,
    index: int,
    record: PreferenceRecord,
    tokens: TokenizedRecord,
) -> None:
    """Check what is stored of a record with `--top-k` against its text and its tokens.

    Args:
        store: one that was scored with `--top-k`.
        tokenizer: the model's.
        index: of the record.
        record: its text.
        tokens: which the model's tokenizer makes of it, as many as are scored.

    Raises:
        UserError: a value cannot be; names response, token and file.
    """
    fields = store.manifest["top_k"]
    keeper = TopKeeper(fields["k"], fields["responses"], tokenizer)
    marks = scored_marks(tokens.response_ids, tokens.scored)
    for number, text in enumerate(keeper.texts(record, tokens)):
        scored = tokens.response_ids[number][marks[number]]
        check_rules(
            _rules(store, keeper, index, number, scored, text),
            f"record {record.id!r}, {record.names[number]!r}",
            store.prefix,
            f"score it again with --top-k {fields['k']}",
        )


def _rules(
    store: LogprobStore, keeper: TopKeeper, index: int, number: int, own: np.ndarray, text: Text
) -> Iterator[Rule]:
    """What holds of a response whose scored tokens are `own` `[L]`."""
    lengths, identity = store.byte_lengths(index, number), store.texts[index, number]
    yield Rule(
        lengths != text[0],
        "_bytes.bin",
        lambda t: f"{lengths[t]} bytes, expected {text[0][t]}, as its tokenizer has them",
    )
    yield Rule(
        np.array([identity.tolist() != text[1]]),
        "_texts.npy",
        lambda t: f"the identity {identity}, expected {text[1]}, that of the record's text",
        "text",
    )
    if not keeper.keeps(number):
        return
    size, top = store.manifest["top_k"]["vocab_size"], store.top(index, number)
    yield Rule(
        (top.ids < 0) | (top.ids >= size),
        "_topk_ids.bin",
        lambda t: f"the ids {top.ids[t].tolist()}, expected ids of at least 0 below {size}",
    )
    yield Rule(
        twice(top.ids),
        "_topk_ids.bin",
        lambda t: f"the ids {top.ids[t].tolist()}, expected each of them once",
    )
    logps = np.column_stack([top.logps, top.tail])
    rising = np.zeros_like(logps, bool)
    rising[:, 1:-1] = logps[:, 1:-1] > logps[:, :-2]
    yield Rule(
        ~(logps <= 0) | rising,
        "_topk_logps.bin",
        lambda t: (
            f"the log-probs {logps[t].tolist()}, expected falling ones of at most 0, and "
            "that of all other tokens"
        ),
    )
    mass = np.exp(logps, dtype=np.float64).sum(axis=1)
    yield Rule(
        abs(mass - 1) > MASS,
        "_topk_logps.bin",
        lambda t: f"log-probs whose probabilities sum to {mass[t]:.4f}, expected 1",
    )
    yield from _rules_of_observed(store, index, number, own)


def _rules_of_observed(
    store: LogprobStore, index: int, number: int, own: np.ndarray
) -> Iterator[Rule]:
    """What the log-prob of each token itself says of those among the most probable."""
    top = store.top(index, number)
    values, here = store.logprobs(index, number), top.ids == own[:, None]
    among = np.where(here, top.logps, 0.0).sum(axis=1)
    room = _HALF * abs(values) + _EQUAL
    yield Rule(
        here.any(axis=1) & (abs(among - values) > room),
        "_topk_logps.bin",
        lambda t: (
            f"{among[t]:.4f} as log-prob of the token itself, but {store.prefix}.bin has "
            f"{values[t]:.4f}"
        ),
    )
    yield Rule(
        ~here.any(axis=1) & (values > top.logps[:, -1] + room),
        "_topk_ids.bin",
        lambda t: (
            f"the ids {top.ids[t].tolist()}, expected {own[t]} among them: its log-prob in "
            f"{store.prefix}.bin, {values[t]:.4f}, is above the last one's"
        ),
    )
