"""Pairs of random tokens, for rows of checks."""

from collections.abc import Sequence

import numpy as np

from megatron_infifpo.rows.preference_dataset import PreferencePair


def random_pairs(
    lengths: Sequence[tuple[int, Sequence[int]]], vocabulary: int
) -> list[PreferencePair]:
    """Pairs with prompts and responses of so many tokens: `[(prompt, (response, ...)), ...]`."""
    rng = np.random.default_rng(1)
    return [
        PreferencePair(
            index,
            rng.integers(0, vocabulary, prompt),
            tuple(rng.integers(0, vocabulary, length) for length in responses),
        )
        for index, (prompt, responses) in enumerate(lengths)
    ]
