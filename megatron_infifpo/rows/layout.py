"""How a row lies on ranks: what decides how many tokens it has, and where they are."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowLayout:
    """How pairs become the tokens of a row.

    Attributes:
        tensor_parallel: ranks that compute a row together; under sequence parallelism each holds
            an equal share of its tokens.
        product_tokens: a rank's matrix products take a multiple of so many (FP8's).
        share_prompt: a row holds a pair's prompt once, and not once a response.
        context_parallel: ranks that each compute a part of a row's tokens; see `pieces`.
    """

    tensor_parallel: int = 1
    product_tokens: int = 1
    share_prompt: bool = False
    context_parallel: int = 1

    @property
    def multiple(self) -> int:
        """What the tokens of a row are padded to a multiple of."""
        return self.context_parallel * self.tensor_parallel * self.product_tokens

    def padding(self, tokens: int) -> int:
        """Return how many tokens are added to a row of so many."""
        # Where ranks each have a part, their parts differ by up to two tokens before.
        least = 2 * (self.context_parallel - 1)
        return least + -(tokens + least) % self.multiple

    def pair_tokens[T: (int, np.ndarray)](self, prompt: T, responses: T, count: T) -> T:
        """Return the tokens of a packed pair, without padding.

        Args:
            prompt: tokens of its prompt.
            responses: tokens of all its responses.
            count: of the responses.
        """
        return prompt * (1 if self.share_prompt else count) + responses


PLAIN = RowLayout()
"""One rank, no padding, a prompt for each response."""


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return start ... start + length - 1 for each, joined, int64."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
