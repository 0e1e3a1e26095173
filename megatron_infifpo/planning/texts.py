"""Lengths of a prompt and its responses, and what attention makes of them."""

from dataclasses import dataclass, replace

from megatron_infifpo.rows.layout import RowLayout


@dataclass(frozen=True)
class Texts:
    """A prompt with its responses, as a row has them.

    Attributes:
        prompt, response: tokens; all responses have as many.
        responses: how many.
        share_prompt: whether the row has the prompt once.
    """

    prompt: int
    response: int
    responses: int
    share_prompt: bool

    @property
    def length(self) -> int:
        """Tokens of a text: the prompt with one response."""
        return self.prompt + self.response

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        layout = RowLayout(share_prompt=self.share_prompt)
        return layout.pair_tokens(self.prompt, self.responses * self.response, self.responses)

    @property
    def attended(self) -> int:
        """Twice the (query, key) pairs: `2 P L + L^2` of L tokens that see P others."""
        if not self.share_prompt:
            return self.responses * self.length**2
        others = self.responses - 1
        return self.length**2 + others * (2 * self.prompt + self.response) * self.response

    def keys(self, context: int) -> float:
        """Keys that a rank's attention selects, for a token of the row; 0: it takes them all.

        A shared prompt counts once more for each other response. Of `context` ranks each has two
        pieces of every segment, which see its text up to their ends: together `1 + 1 / (2 context)`
        of the segment, and a prompt twice.
        """
        again = self.prompt * (self.responses - 1) if self.share_prompt else 0
        if context == 1:
            return (self.tokens + again) / self.tokens if self.share_prompt else 0.0
        return 1 + 1 / (2 * context) + 2 * again / self.tokens

    def scaled(self, length: int) -> "Texts":
        """Return texts of another length, of the same proportions."""
        response = max(1, round(self.response * length / self.length))
        return replace(self, prompt=length - response, response=response)
