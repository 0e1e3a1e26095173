"""Name the first value of a file that cannot be."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from megatron_infifpo.errors import UserError

MASS = 1e-2
"""How far a sum of probabilities may be from 1 whose log-probs are float16."""


class Rule(NamedTuple):
    """What holds for every token of a response, or for other units.

    Attributes:
        broken: bool `[K]` or `[K, ...]`, where it does not.
        file: what the file is called after its prefix.
        say: what a token has there, and what was expected.
        unit: what there are K of.
    """

    broken: np.ndarray
    file: str
    say: Callable[[int], str]
    unit: str = "token"


def check_rules(rules: Iterable[Rule], response: str, prefix: str, again: str) -> None:
    """Look for the first token that breaks a rule.

    Args:
        rules: one after the other: what a later one reads is as the earlier ones say.
        response: which one it is, for errors.
        prefix: of the files.
        again: how they are written anew.

    Raises:
        UserError: one does; names response, token and file.
    """
    for rule in rules:
        if rule.broken.any():
            at = int(np.argwhere(rule.broken)[0][0])
            raise UserError(
                f"{response}, {rule.unit} {at}: {prefix}{rule.file} has {rule.say(at)}: the files "
                f"were changed or damaged; {again}"
            )


def twice(ids: np.ndarray, *, among: np.ndarray | None = None) -> np.ndarray:
    """Whether ids `[K, k]` are not distinct, bool `[K]`; of those `among`, `[K, k]`, alone."""
    if among is not None:  # what does not count is made distinct
        ids = np.where(among, ids, np.iinfo(np.int64).min + np.arange(ids.shape[1]))
    ordered = np.sort(ids, axis=1)
    return (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
