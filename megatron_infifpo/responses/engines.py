"""Engines that sample responses: vLLM where it is installed, a server, or transformers."""

import http.client
import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo import cpu
from megatron_infifpo.cli import UserError
from megatron_infifpo.data.tokenization import ChatTokenizer
from megatron_infifpo.responses.prompts import Prompt


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Attributes:
        count: responses of a prompt.
        temperature: 0 is greedy.
        top_p: share of the probability that is sampled from.
        max_tokens: of a response.
        seed: of the whole job; a batch of prompts has its own, made of it.
    """

    count: int = 4
    temperature: float = 0.8
    top_p: float = 1.0
    max_tokens: int = 2048
    seed: int = 0


Engine = Callable[[Sequence[Prompt], int], list[list[str]]]
"""Takes prompts and a seed; returns the responses of each."""


def transformers_engine(model: str, chat: ChatTokenizer, how: Sampling, options: Any) -> Engine:
    """Sample with transformers, in batches padded on the left."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if options.bf16 else torch.float32
    network: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, use_safetensors=True, trust_remote_code=options.trust_remote_code
    )
    network.to(cpu.device()).eval()
    ends = {chat.tokenizer.eos_token_id, chat.end_of_turn_ids[-1]} - {None}
    pad = chat.end_of_turn_ids[-1]
    greedy = how.temperature == 0
    sampling = {} if greedy else {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0}

    def generate(prompts: Sequence[Prompt], seed: int) -> list[list[str]]:
        torch.manual_seed(seed)
        batches = itertools.batched(prompts, options.batch)
        return [texts for batch in batches for texts in generate_batch(batch)]

    def generate_batch(prompts: Sequence[Prompt]) -> list[list[str]]:
        ids = chat.prompt_ids([(prompt.messages, prompt.id) for prompt in prompts])
        longest = max(map(len, ids))
        padded = torch.tensor([[pad] * (longest - len(i)) + i for i in ids], device=network.device)
        mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids])
        with torch.inference_mode():
            output = network.generate(
                input_ids=padded,
                attention_mask=mask.to(network.device),
                do_sample=not greedy,
                num_return_sequences=1 if greedy else how.count,
                max_new_tokens=how.max_tokens,
                eos_token_id=sorted(ends),
                pad_token_id=pad,
                **sampling,
            )
        texts = [_text(chat, row, ends) for row in output[:, longest:].tolist()]
        each = len(texts) // len(prompts)
        return [texts[i : i + each] * (how.count // each) for i in range(0, len(texts), each)]

    return generate


def _text(chat: ChatTokenizer, ids: list[int], ends: set[int]) -> str:
    """Decode a response, up to where its turn ends."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return str(chat.tokenizer.decode(ids[:stop], skip_special_tokens=True))


def vllm_engine(model: str, chat: ChatTokenizer, how: Sampling, options: Any) -> Engine:
    """Sample with vLLM, offline; prompts are tokenized by us, as scoring does."""
    try:
        import vllm
    except ImportError:
        raise UserError(
            "--engine vllm needs vLLM: install it, or choose --engine transformers, or --engine "
            "server with the address of one"
        ) from None
    network = vllm.LLM(
        model=model,
        tensor_parallel_size=options.tensor_parallel_size,
        dtype="bfloat16" if options.bf16 else "float32",
        trust_remote_code=options.trust_remote_code,
    )

    def generate(prompts: Sequence[Prompt], seed: int) -> list[list[str]]:
        ids = chat.prompt_ids([(prompt.messages, prompt.id) for prompt in prompts])
        settings = vllm.SamplingParams(
            n=1 if how.temperature == 0 else how.count,  # greedy: all are the same
            temperature=how.temperature,
            top_p=how.top_p,
            max_tokens=how.max_tokens,
            seed=seed,
            stop_token_ids=[chat.end_of_turn_ids[-1]],
        )
        outputs = network.generate([{"prompt_token_ids": row} for row in ids], settings)
        texts = [[str(one.text) for one in output.outputs] for output in outputs]
        return [found * (how.count // len(found)) for found in texts]

    return generate


def server_engine(model: str, how: Sampling, options: Any) -> Engine:
    """Sample from an OpenAI-compatible server, which has the chat template; several at a time."""
    address = options.server.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json"}
    if options.server_key_file:
        key = Path(options.server_key_file).read_text(encoding="utf-8").strip()
        headers["Authorization"] = f"Bearer {key}"

    def ask(prompt: Prompt, seed: int) -> list[str]:
        question = {
            "model": model,
            "messages": list(prompt.messages),
            "n": how.count,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "max_tokens": how.max_tokens,
            "seed": seed,
        }
        request = urllib.request.Request(address, json.dumps(question).encode(), headers)
        for attempt in range(options.server_retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=options.server_timeout) as answer:
                    choices = json.load(answer)["choices"]
                return [str(choice["message"]["content"] or "") for choice in choices]
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    reason = error.read(500).decode(errors="replace")
                    raise UserError(f"{address} refuses {prompt.id!r}: {reason}") from None
                problem: Exception = error
            except (
                OSError,
                http.client.HTTPException,
                LookupError,
                ValueError,
                TypeError,
            ) as error:
                problem = error
            if attempt < options.server_retries:
                time.sleep(min(30, 2**attempt))
        raise UserError(
            f"{address} does not answer {prompt.id!r}: {problem}; finished shards are kept, run "
            "the command again"
        )

    def generate(prompts: Sequence[Prompt], seed: int) -> list[list[str]]:
        with ThreadPoolExecutor(options.server_requests) as pool:
            return list(pool.map(ask, prompts, [seed] * len(prompts)))

    return generate
