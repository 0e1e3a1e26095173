"""Ask an OpenAI-compatible server, again where it fails."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_number, check_positive, check_types

OF_THE_PROMPT = (400, 413, 422)  # others, such as 401 and 404, are the same for all prompts
LATER = (408, 425, 429)


class RefusedError(Exception):
    """What a server says to a prompt that it does not take."""


@dataclass(frozen=True)
class ServerAddress:
    """Where a server is, and how often it is asked.

    Attributes:
        server: its address, such as `http://localhost:8000/v1`.
        server_key_file: holds the server's key.
        server_requests: at once.
        server_timeout: seconds of a request.
        server_retries: of a request that fails.
    """

    server: str
    server_key_file: str | None = None
    server_requests: int = 32
    server_timeout: float = 600.0
    server_retries: int = 4

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


class Client:
    """Asks one server.

    Attributes:
        base: its address, without a slash at the end.
    """

    def __init__(self, options: ServerAddress) -> None:
        """Take the address; nothing is asked yet.

        Raises:
            UserError: the file with its key cannot be read.
        """
        self.options, self.base = options, options.server.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if options.server_key_file:
            try:
                key = Path(options.server_key_file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"cannot read --server-key-file {options.server_key_file} ({error}), expected "
                    "a file that holds the key"
                ) from None
            self._headers["Authorization"] = f"Bearer {key}"

    def ask[Answer](
        self,
        address: str,
        about: str,
        read: Callable[[Any], Answer],
        question: dict[str, Any] | None = None,
    ) -> Answer:
        """Ask until there is an answer.

        Args:
            address: below `base`, or beside it.
            about: what is asked about, for errors.
            read: takes the answer's JSON; a LookupError, ValueError or TypeError of it counts as
                none, and is asked for again.
            question: is posted; without it the address is only read.

        Raises:
            RefusedError: the server does not take the prompt.
            UserError: it does not answer.
        """
        data = None if question is None else json.dumps(question).encode()
        request = urllib.request.Request(address, data, self._headers)
        problem = ""
        for attempt in range(self.options.server_retries + 1):
            if attempt:
                time.sleep(min(30, 2 ** (attempt - 1)))
            try:
                with urllib.request.urlopen(request, timeout=self.options.server_timeout) as answer:
                    return read(json.load(answer))
            except urllib.error.HTTPError as error:
                reason = error.read(500).decode(errors="replace")
                if error.code in OF_THE_PROMPT:
                    raise RefusedError(reason) from None
                if error.code < 500 and error.code not in LATER:
                    raise UserError(f"{address} refuses {about}: {reason}") from None
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
            f"{address} does not answer {about}: {problem}; finished shards are kept, "
            "run the command again"
        )
