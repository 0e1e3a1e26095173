"""Stand-ins for vLLM, with its names, shapes and refusals, whose numbers are transformers'.

As vLLM's documentation has them: `LLM.generate` with `prompt_token_ids`, whose outputs have
`prompt_logprobs`: None, then {id: Logprob} with the prompt's own token first, and the most probable
ones behind it; and `/v1/completions`, which has the same as JSON, with ids as texts.
"""

import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

OPTIONS = {
    "model", "tokenizer", "tensor_parallel_size", "dtype", "trust_remote_code", "max_model_len",
    "max_logprobs", "enable_prefix_caching", "enable_chunked_prefill", "max_num_batched_tokens",
}  # fmt: skip


@dataclass
class Logprob:
    """vLLM's."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class SamplingParams:
    """vLLM's, the fields that are used here."""

    temperature: float = 1.0
    max_tokens: int = 16
    prompt_logprobs: int | None = None
    detokenize: bool = True


class Network:
    """A model that reads prompts as vLLM does."""

    def __init__(self, model: str | Path, most: int, max_logprobs: int = 20) -> None:
        """Load it; it takes so many tokens, and gives so many log-probs."""
        self.network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.most, self.max_logprobs = most, max_logprobs

    @torch.no_grad()
    def read(self, ids: list[int], top: int | None) -> list[dict[int, Logprob] | None] | None:
        """Return `prompt_logprobs`.

        Raises:
            ValueError: as vLLM does.
        """
        if len(ids) + 1 > self.most:
            raise ValueError(f"prompt of {len(ids)} plus 1 is longer than {self.most}")
        if top is None:
            return None
        if top > self.max_logprobs:
            raise ValueError(f"Requested prompt logprobs of {top}, greater than max allowed: "
                             f"{self.max_logprobs}")  # fmt: skip
        rows = self.network(torch.tensor([ids])).logits[0].log_softmax(-1)
        found: list[dict[int, Logprob] | None] = [None]
        for own, row in zip(ids[1:], rows, strict=False):
            best = row.topk(top)
            position = {own: Logprob(float(row[own]), int((row >= row[own]).sum()))}
            for rank, i in enumerate(best.indices.tolist(), 1):
                position[i] = Logprob(float(row[i]), rank)
            found.append(position)
        return found


def module(loaded: list[dict[str, Any]], asked: list[tuple[int, Any]]) -> Any:
    """A module `vllm`, that notes what is loaded, and how many prompts are asked how."""

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            assert {"model", *options} <= OPTIONS
            loaded.append({"model": model, **options})
            self._network = Network(model, options["max_model_len"], options["max_logprobs"])

        def generate(
            self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True
        ) -> list[Any]:
            asked.append((len(prompts), sampling_params))
            return [
                types.SimpleNamespace(
                    prompt_token_ids=prompt["prompt_token_ids"],
                    prompt_logprobs=self._network.read(
                        prompt["prompt_token_ids"], sampling_params.prompt_logprobs
                    ),
                    outputs=[types.SimpleNamespace(token_ids=[0], finish_reason="length")],
                )
                for prompt in prompts
            ]

    made: Any = types.ModuleType("vllm")
    made.LLM, made.SamplingParams, made.__version__ = LLM, SamplingParams, "0.11.0"
    return made


def served(network: Network, question: dict[str, Any], *, says_ids: bool) -> tuple[int, Any]:
    """What `/v1/completions` answers; it says which ids it has read from 0.10.2 on."""
    ids = question["prompt"]
    try:
        positions = network.read(ids, question.get("prompt_logprobs"))
    except ValueError as error:
        return 400, {"object": "error", "message": str(error), "code": 400}
    choice: dict[str, Any] = {"index": 0, "text": "x", "finish_reason": "length", "logprobs": None}
    choice["prompt_logprobs"] = positions and [
        one and {str(token): vars(its) for token, its in one.items()} for one in positions
    ]
    if says_ids and question.get("return_token_ids"):
        choice |= {"prompt_token_ids": ids, "token_ids": [0]}
    return 200, {"id": "cmpl-1", "object": "text_completion", "choices": [choice]}


def pages(*names: str, most: int) -> dict[str, Any]:
    """`/v1/models` and `/version`."""
    cards = [{"id": name, "object": "model", "max_model_len": most} for name in names]
    return {"/v1/models": {"object": "list", "data": cards}, "/version": {"version": "0.11.0"}}
