"""Sample from an OpenAI-compatible server, which has the chat template; several at a time."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.responses.answers import (
    MARKERS,
    REFUSED,
    UNREAD_CALL,
    Response,
    from_choice,
    split_reasoning,
)
from megatron_infifpo.responses.calls import writes_call
from megatron_infifpo.responses.engines import Measured, NotMeasuredError, Sampling
from megatron_infifpo.responses.prompts import Prompt
from megatron_infifpo.scoring.client import Client, RefusedError, ServerAddress

# A server without a parser of reasoning leaves it in the content, in whatever markers.
_ANY_TEMPLATE = "".join(end for _, end in MARKERS)


@dataclass(frozen=True)
class ServerOptions(ServerAddress):
    """Where a server is, and how it is asked.

    Attributes:
        template_options: variables for the server's chat template.
        skip_refused: leave prompts out that the server refuses; else that is an error.
    """

    template_options: Mapping[str, Any] = field(default_factory=dict)
    skip_refused: bool = False


class ServerEngine:
    """Asks a server."""

    def __init__(self, model: str, how: Sampling, options: ServerOptions) -> None:
        """Take the address; nothing is asked yet.

        Raises:
            UserError: the file with its key cannot be read.
        """
        self.model, self.how, self.options = model, how, options
        self.client = Client(options)
        self.address = self.client.base + "/chat/completions"

    def sample(
        self, prompts: Sequence[Prompt], counts: Sequence[int], seed: int
    ) -> list[list[Response]]:
        """Return what the server sends: so many responses of each prompt, or fewer."""

        def ask(prompt: Prompt, count: int) -> list[Response]:
            how = self.how
            try:
                answer = self._ask(prompt, count, seed, how.temperature, how.top_p, how.max_tokens)
                return [self._response(choice, prompt) for choice in answer]
            except RefusedError as error:
                if not self.options.skip_refused:
                    raise UserError(f"{self.address} refuses {prompt.id!r}: {error}") from None
                return [Response("", REFUSED)]

        with ThreadPoolExecutor(self.options.server_requests) as pool:
            return list(pool.map(ask, prompts, counts))

    def measure(self, prompts: Sequence[Prompt], max_tokens: int, seed: int) -> list[Measured]:
        """Return one response of each prompt with the server's log-probs.

        At temperature 1: whether log-probs are of before or after it differs by server.
        """
        found = []
        for prompt in prompts:
            try:
                choice = self._ask(prompt, 1, seed, 1.0, 1.0, max_tokens, logprobs=True)[0]
                content = choice["logprobs"]["content"]
                tokens = [str(one["token"]) for one in content]
                values = [float(one["logprob"]) for one in content]
                found.append(Measured(prompt, [], self._response(choice, prompt), tokens, values))
            except RefusedError as error:
                raise NotMeasuredError(f"the server refuses to give log-probs ({error})") from None
            except (LookupError, TypeError, ValueError):
                raise NotMeasuredError("the server gives no log-probs") from None
        return found

    def _response(self, choice: dict[str, Any], prompt: Prompt) -> Response:
        response = from_choice(choice)
        if response.reasoning is None:
            text, reasoning = split_reasoning(response.text, _ANY_TEMPLATE, "")
            response = replace(response, text=text, reasoning=reasoning)
        # A server without a parser of calls leaves them in the content, too.
        if not response.tool_calls and writes_call(response.text, prompt.tools):
            return replace(response, finish=UNREAD_CALL)
        return response

    def _ask(
        self,
        prompt: Prompt,
        count: int,
        seed: int,
        temperature: float,
        top_p: float,
        max_tokens: int,
        **more: Any,
    ) -> list[dict[str, Any]]:
        """Return the choices of one answer; errors as `Client.ask`."""
        question = {
            "model": self.model,
            "messages": list(prompt.messages),
            "n": count,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "seed": seed,
            **more,
        }
        if prompt.tools:
            question["tools"] = list(prompt.tools)
        if template_options := {**self.options.template_options, **prompt.template_options}:
            question["chat_template_kwargs"] = template_options
        return self.client.ask(self.address, repr(prompt.id), _choices, question)


def _choices(answer: Any) -> list[dict[str, Any]]:
    """Return the choices of an answer that has some."""
    choices = answer["choices"]
    if not isinstance(choices, list) or not all(
        isinstance(one["message"], dict) for one in choices
    ):
        raise TypeError(f"its choices are {str(choices)[:60]!r}")
    return choices
