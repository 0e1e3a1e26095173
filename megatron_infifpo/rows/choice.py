"""Which responses of a record a method compares, of pairs and of lists."""

from dataclasses import dataclass

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import RESPONSES
from megatron_infifpo.tokens.dataset import TokenDataset

NO_SCORE = "no response with a score"
NO_SCORES = "fewer than two responses with a score"
NO_CONTRAST = "no contrast: all scores are equal"


@dataclass(frozen=True)
class Choice:
    """The responses of N records that a method compares, at most R of each.

    Attributes:
        columns: int16 `[N, R]`, places of the responses in their records; -1, at the end, where
            there are fewer.
        obstacles: bool `[N]` by reason: records that have not enough of them.
    """

    columns: np.ndarray
    obstacles: dict[str, np.ndarray]


def choose(tokens: TokenDataset, responses: int | None, *, rewards: bool = False) -> Choice:
    """Choose responses of every record.

    Args:
        tokens: the records.
        responses: 1: the chosen one; 2: chosen and rejected; 3: pivot_chosen, too; of a list the
            best one by score, or the best and the worst, where the first one wins ties. None: all
            that a record has.
        rewards: responses without a score are left out, and a record needs two with one.

    Raises:
        UserError: the records have too few responses, or no scores.
    """
    if responses is None:
        return _all(tokens, rewards=rewards)
    if tokens.listed and responses <= 2:
        return _best(tokens, responses)
    if tokens.listed or responses > len(tokens.responses):
        raise UserError(
            f"record {tokens.ids(0)!r} of {tokens.prefix} has no {RESPONSES[responses - 1]!r}, and "
            f"neither has any other: the method compares {', '.join(RESPONSES[:responses])}; give "
            "the field in every record and prepare them again"
        )
    first = np.arange(responses, dtype=np.int16)
    return Choice(np.broadcast_to(first, (len(tokens), responses)), {})


def _all(tokens: TokenDataset, *, rewards: bool) -> Choice:
    usable = tokens.response_lengths > 0
    if rewards:
        usable = usable & np.isfinite(_scores(tokens, "the method needs the rewards of responses"))
    enough = usable.sum(axis=1) >= 2
    # The usable ones first, in their order.
    order = np.argsort(~usable, axis=1, kind="stable").astype(np.int16)
    columns = np.where(np.take_along_axis(usable, order, axis=1), order, np.int16(-1))
    width = max(1, int(usable.sum(axis=1).max(initial=0)))
    few = ~enough & ~tokens.masked_records
    return Choice(columns[:, :width], {NO_SCORES: few} if rewards else {})


def _best(tokens: TokenDataset, responses: int) -> Choice:
    scores = _scores(tokens, "they tell which response of a list is the best")
    known = np.isfinite(scores) & (tokens.response_lengths > 0)
    best = np.where(known, scores, -np.inf).argmax(axis=1)
    worst = np.where(known, scores, np.inf).argmin(axis=1)
    columns = np.stack([best, worst], axis=1)[:, :responses].astype(np.int16)
    seen, counts = ~tokens.masked_records, known.sum(axis=1)
    if responses == 1:
        return Choice(columns, {NO_SCORE: seen & (counts < 1)})
    taken = np.take_along_axis(scores, columns, axis=1)
    same = seen & (counts >= 2) & (taken[:, 0] == taken[:, 1])
    return Choice(columns, {NO_SCORES: seen & (counts < 2), NO_CONTRAST: same})


def _scores(tokens: TokenDataset, why: str) -> np.ndarray:
    if tokens.scores is None:
        raise UserError(
            f"{tokens.prefix} has no scores of its responses, and {why}: score them with infifpo "
            "label --list, or give 'scores' in the records, and prepare them again; --method pad "
            "needs none"
        )
    return tokens.scores
