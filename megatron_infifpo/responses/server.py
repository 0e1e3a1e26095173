"""Sample from an OpenAI-compatible server, which has the chat template; several at a time."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_number, check_positive, check_types
from megatron_infifpo.responses.answers import (
    MARKERS,
    REFUSED,
    Response,
    from_choice,
    split_reasoning,
)
from megatron_infifpo.responses.engines import Measured, NotMeasuredError, Sampling
from megatron_infifpo.responses.prompts import Prompt

# A server without a parser of reasoning leaves it in the content, in whatever markers.
_ANY_TEMPLATE = "".join(end for _, end in MARKERS)


OF_THE_PROMPT = (400, 413, 422)  # others, such as 401 and 404, are the same for all prompts
LATER = (408, 425, 429)


class RefusedError(Exception):
    """What a server says to a prompt that it does not take."""


@dataclass(frozen=True)
class ServerOptions:
    """Where a server is, and how it is asked.

    Attributes:
        server: its address, such as `http://localhost:8000/v1`.
        server_key_file: holds the server's key.
        server_requests: at once.
        server_timeout: seconds of a request.
        server_retries: of a request that fails.
        template_options: variables for the server's chat template.
        skip_refused: leave prompts out that the server refuses; else that is an error.
    """

    server: str
    server_key_file: str | None = None
    server_requests: int = 32
    server_timeout: float = 600.0
    server_retries: int = 4
    template_options: Mapping[str, Any] = field(default_factory=dict)
    skip_refused: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no address, and what is no time.

        Raises:
            UserError: it is none.
        """
        check_types(self)
        check_positive(self, "server_requests")
        check_positive(self, "server_retries", least=0)
        check_number(self, "server_timeout", above=True)
        if not self.server.startswith(("http://", "https://")):
            raise UserError(f"--server is {self.server}, expected such as http://localhost:8000/v1")


class ServerEngine:
    """Asks a server."""

    def __init__(self, model: str, how: Sampling, options: ServerOptions) -> None:
        """Take the address; nothing is asked yet.

        Raises:
            UserError: the file with its key cannot be read.
        """
        self.model, self.how, self.options = model, how, options
        self.address = options.server.rstrip("/") + "/chat/completions"
        self.headers = {"Content-Type": "application/json"}
        if options.server_key_file:
            try:
                key = Path(options.server_key_file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"cannot read --server-key-file {options.server_key_file} ({error}), expected "
                    "a file that holds the key"
                ) from None
            self.headers["Authorization"] = f"Bearer {key}"

    def sample(
        self, prompts: Sequence[Prompt], counts: Sequence[int], seed: int
    ) -> list[list[Response]]:
        """Return what the server sends: so many responses of each prompt, or fewer."""

        def ask(prompt: Prompt, count: int) -> list[Response]:
            how = self.how
            try:
                answer = self._ask(prompt, count, seed, how.temperature, how.top_p, how.max_tokens)
                return [self._response(choice) for choice in answer]
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
                found.append(Measured(prompt, [], self._response(choice), tokens, values))
            except RefusedError as error:
                raise NotMeasuredError(f"the server refuses to give log-probs ({error})") from None
            except (LookupError, TypeError, ValueError):
                raise NotMeasuredError("the server gives no log-probs") from None
        return found

    def _response(self, choice: dict[str, Any]) -> Response:
        response = from_choice(choice)
        if response.reasoning is not None:
            return response
        text, reasoning = split_reasoning(response.text, _ANY_TEMPLATE, "")
        return replace(response, text=text, reasoning=reasoning)

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
        """Return the choices of one answer; errors as `_choices`."""
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
        return self._choices(prompt, question)

    def _choices(self, prompt: Prompt, question: dict[str, Any]) -> list[dict[str, Any]]:
        """Ask until there is an answer.

        Raises:
            RefusedError: the server does not take the prompt.
            UserError: it does not answer.
        """
        request = urllib.request.Request(self.address, json.dumps(question).encode(), self.headers)
        problem = ""
        for attempt in range(self.options.server_retries + 1):
            if attempt:
                time.sleep(min(30, 2 ** (attempt - 1)))
            try:
                with urllib.request.urlopen(request, timeout=self.options.server_timeout) as answer:
                    choices = json.load(answer)["choices"]
                if not isinstance(choices, list) or not all(
                    isinstance(one["message"], dict) for one in choices
                ):
                    raise TypeError(f"its choices are {str(choices)[:60]!r}")
                return choices
            except urllib.error.HTTPError as error:
                reason = error.read(500).decode(errors="replace")
                if error.code in OF_THE_PROMPT:
                    raise RefusedError(reason) from None
                if error.code < 500 and error.code not in LATER:
                    raise UserError(f"{self.address} refuses {prompt.id!r}: {reason}") from None
                problem = str(error)
            except (
                OSError,
                http.client.HTTPException,
                LookupError,
                ValueError,
                TypeError,
            ) as error:
                problem = str(error) or type(error).__name__
        raise UserError(
            f"{self.address} does not answer {prompt.id!r}: {problem}; finished shards are kept, "
            "run the command again"
        )
