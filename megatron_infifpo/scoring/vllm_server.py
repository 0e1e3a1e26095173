"""Ask a server of vLLM for the log-probs of texts: `prompt_logprobs` of its `/v1/completions`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import batched
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.scoring.client import Client, RefusedError, ServerAddress
from megatron_infifpo.scoring.vllm_answers import Answer, Asked, Found, read

# All that its log-probs could depend on: a server takes what a request lacks from the model's
# generation_config.json.
_PLAIN = {
    "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1, "max_tokens": 1, "seed": 0,
}  # fmt: skip


class VllmServer:
    """A model of a server."""

    def __init__(self, options: ServerAddress, name: str | None, context_length: int) -> None:
        """Find the model.

        Args:
            options: where the server is.
            name: of the model there; None: the only one.
            context_length: tokens of the longest text.

        Raises:
            UserError: the server does not answer, has no such model, or takes shorter texts.
        """
        self.client, self.requests = Client(options), options.server_requests
        self.address = f"{self.client.base}/completions"
        card = self._card(name)
        self.name, longest = card["id"], card.get("max_model_len")
        if longest is not None and longest < context_length + 1:
            raise UserError(
                f"{self.client.base} takes {longest} tokens (max_model_len), and needs one more "
                f"than the {context_length} of the longest text: start it with --max-model-len "
                f"{context_length + 1}, or give --context-length {longest - 1}"
            )
        self.facts = {
            "vllm_version": self._version(),
            "server_model": self.name,
            "device": "a server's",
        }

    def ask(self, texts: Sequence[Asked], top: int) -> list[Found]:
        """Return the log-probs of texts; several are asked about at a time."""

        def one(text: Asked) -> Found:
            return read(text, self._ask(text, top), top)

        found: list[Found] = []
        with ThreadPoolExecutor(self.requests) as pool:
            # Few at a time: after an error nothing more is asked.
            for group in batched(texts, 2 * self.requests):
                found += pool.map(one, group)
        return found

    def _ask(self, text: Asked, top: int) -> Answer:
        question = {
            "model": self.name,
            "prompt": text.ids,
            "prompt_logprobs": top,
            "return_token_ids": True,  # versions before 0.10.2 do not know it, and leave it
            **_PLAIN,
        }
        try:
            return self.client.ask(self.address, f"record {text.record}", _answer, question)
        except RefusedError as error:
            hint = f" (it may need --max-logprobs {top})" if top > 20 else ""
            raise UserError(f"{self.address} refuses record {text.record}: {error}{hint}") from None

    def _card(self, name: str | None) -> dict[str, Any]:
        """Return what the server says of the model."""
        address = f"{self.client.base}/models"
        try:
            cards = self.client.ask(address, "which models it has", _cards)
        except RefusedError as error:
            raise UserError(f"{address} refuses to say which models it has: {error}") from None
        names = ", ".join(cards)
        if name is None and len(cards) != 1:
            raise UserError(f"{self.client.base} has the models {names}: choose --server-model")
        if name is not None and name not in cards:
            raise UserError(f"{self.client.base} has no model {name}, only {names}: --server-model")
        return cards[name] if name is not None else next(iter(cards.values()))

    def _version(self) -> str | None:
        """Return vLLM's version; None where the server does not say."""
        try:
            address = f"{self.client.base.removesuffix('/v1')}/version"
            return self.client.ask(address, "its version", lambda found: str(found["version"]))
        except (RefusedError, UserError):  # what stands before it may not let this through
            return None


def _cards(answer: Any) -> dict[str, dict[str, Any]]:
    return {str(card["id"]): dict(card) for card in answer["data"]}


def _answer(answer: Any) -> Answer:
    """Read what a server says of a text; JSON has its ids as texts."""
    (choice,) = answer["choices"]
    positions = choice.get("prompt_logprobs")
    if positions is not None:
        positions = [
            one and {int(token): float(its["logprob"]) for token, its in one.items()}
            for one in positions
        ]
    return Answer(choice.get("prompt_token_ids"), positions)
