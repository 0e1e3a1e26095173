"""Tiny models that end their turns, and a chat server with moods, for tests of sampling."""

import contextlib
import http.server
import json
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support import tiny


def save_talker(folder: Path, **extra: Any) -> Path:
    """Save a random model that ends a turn after a few tokens, as chat models do."""
    tiny.save_model(folder, "llama", seed=4, **extra)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(4, 300, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = network.model(ids).last_hidden_state.mean((0, 1))
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    weights["lm_head.weight"][0] += 4 * hidden / hidden.dot(hidden)  # <|end|>
    save_file(weights, path, metadata={"format": "pt"})
    return folder


class ChatServer:
    """Answers as OpenAI's API does, in one of several moods.

    Attributes:
        mood: what it does: a function of the question that returns (status, body).
        pages: what it shows at paths, such as "/v1/models".
        asked: the questions.
        url: where it is.
    """

    def __init__(self) -> None:
        """Start it on a free port."""
        self.mood: Any = None
        self.pages: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.asked.append(question)
                self._send(*owner.mood(question))

            def do_GET(self) -> None:
                found = self.path in owner.pages
                self._send(200 if found else 404, owner.pages.get(self.path, b"no such page"))

            def _send(self, status: int, body: Any) -> None:
                text = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # who asked has not waited
                    self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        """Stop it."""
        self._server.shutdown()
        self._server.server_close()


def answer(*choices: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """A server's answer of these choices."""
    return 200, {"choices": list(choices)}


def choice(text: str | None, finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    """One choice."""
    found: dict[str, Any] = {"message": {"content": text, **message}}
    return found if finish is None else {**found, "finish_reason": finish}
