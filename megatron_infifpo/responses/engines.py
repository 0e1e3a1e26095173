"""What an engine is that samples responses, and the one of transformers.

On this machine prompts are tokenized by us, as scoring does, and what comes back is made text by
us: an engine is asked for token ids only. vLLM is in `vllm_engine`, a server in `server`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_infifpo.engine.batch_rule import BatchRule
from megatron_infifpo.engine.hf_model import load_causal_lm
from megatron_infifpo.flag_types import check_number, check_positive, check_types
from megatron_infifpo.patches import cpu
from megatron_infifpo.responses.answers import REFUSED, Response
from megatron_infifpo.responses.prompts import Prompt
from megatron_infifpo.responses.turns import Opened, Turns
from megatron_infifpo.tokens.tokenization import ChatTokenizer


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

    def __post_init__(self) -> None:
        """Refuse numbers that are none.

        Raises:
            UserError: one is not.
        """
        check_types(self)
        check_positive(self, "count", "max_tokens")
        check_number(self, "temperature")
        check_number(self, "top_p", most=1.0, above=True)


@dataclass(frozen=True)
class EngineOptions:
    """How a model on this machine is run.

    Attributes:
        bf16: weights in bfloat16, else float32.
        batch: prompts at once, of transformers.
        tensor_model_parallel_size: GPUs of the model, of vLLM.
        trust_remote_code: run code that comes with the model.
        skip_refused: leave prompts out that the chat template refuses; else that is an error.
    """

    bf16: bool = False
    batch: int = 8
    tensor_model_parallel_size: int = 1
    trust_remote_code: bool = False
    skip_refused: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that are none.

        Raises:
            UserError: one is not.
        """
        check_types(self)
        check_positive(self, "batch", "tensor_model_parallel_size")


@dataclass(frozen=True)
class Measured:
    """One response with the engine's own log-probs, at temperature 1.

    Attributes:
        prompt: the prompt.
        prompt_ids: `[P]` as the engine was asked; empty of a server, which makes them itself.
        response: what was answered.
        tokens: `[L]` ids of the response's tokens; of a server their texts.
        logprobs: `[L]`, nats.
    """

    prompt: Prompt
    prompt_ids: list[int]
    response: Response
    tokens: list[int] | list[str]
    logprobs: list[float]


class NotMeasuredError(Exception):
    """Why an engine gives no log-probs."""


class Engine(Protocol):
    """Samples responses."""

    def sample(
        self, prompts: Sequence[Prompt], counts: Sequence[int], seed: int
    ) -> list[list[Response]]:
        """Return responses of each prompt, so many of each or fewer."""

    def measure(self, prompts: Sequence[Prompt], max_tokens: int, seed: int) -> list[Measured]:
        """Return one response of each prompt with the engine's log-probs, at temperature 1.

        Raises:
            NotMeasuredError: it gives none.
        """


class TransformersEngine:
    """Samples with transformers, in batches padded on the left."""

    def __init__(
        self, model: str, chat: ChatTokenizer, how: Sampling, options: EngineOptions
    ) -> None:
        """Load the model.

        Raises:
            UserError: it cannot be loaded.
        """
        from transformers import GenerationConfig

        network = load_causal_lm(
            model,
            dtype=torch.bfloat16 if options.bf16 else torch.float32,
            trust_remote_code=options.trust_remote_code,
            device_map={"": cpu.device()},
        )
        self.network, self.chat, self.how = network, chat, how
        config = network.config.get_text_config()
        self.turns = Turns(
            chat,
            network.generation_config,
            context=getattr(config, "max_position_embeddings", None),
            skip=options.skip_refused,
        )
        # What the model's files prefer (penalties, top-k) would act without a word.
        network.generation_config = GenerationConfig()
        self.batch, self.rule = options.batch, BatchRule(network, writes=True)

    def sample(
        self, prompts: Sequence[Prompt], counts: Sequence[int], seed: int
    ) -> list[list[Response]]:
        """Return so many responses of each prompt."""
        torch.manual_seed(seed)
        found = [[Response("", REFUSED)] for _ in prompts]
        settings: dict[str, Any] = {"do_sample": False}
        if self.how.temperature:
            settings = {"do_sample": True, "temperature": self.how.temperature, "top_k": 0}
            settings["top_p"] = self.how.top_p
        opened = self._open(prompts)
        for batch in self._batches(opened, counts, self.how.max_tokens):
            copies = counts[batch[0]]
            output = self._generate(
                [opened[i].ids for i in batch],
                self.how.max_tokens,
                num_return_sequences=copies,
                **settings,
            )
            rows = iter(output["new"])
            for i in batch:
                found[i] = [self.turns.response(next(rows), opened[i]) for _ in range(copies)]
        return found

    def measure(self, prompts: Sequence[Prompt], max_tokens: int, seed: int) -> list[Measured]:
        """Return one response of each prompt with the log-softmax of the model's own logits."""
        torch.manual_seed(seed)
        found = []
        opened = self._open(prompts)
        for batch in self._batches(opened, [1] * len(prompts), max_tokens):
            output = self._generate(
                [opened[i].ids for i in batch],
                max_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                output_logits=True,
            )
            logits = torch.stack(output["logits"], dim=1).float().cpu()  # [batch, tokens, V]
            chosen = torch.tensor(output["new"])[..., None]
            logprobs = logits.log_softmax(-1).gather(2, chosen)[..., 0].tolist()
            for i, row, values in zip(batch, output["new"], logprobs, strict=True):
                ids = self.turns.cut(row)
                response = self.turns.response(row, opened[i])
                found.append(Measured(prompts[i], opened[i].ids, response, ids, values[: len(ids)]))
        return found

    def _open(self, prompts: Sequence[Prompt]) -> dict[int, Opened]:
        """Render prompts, by index, without those that are left out."""
        return {i: one for i, one in enumerate(self.turns.open_all(prompts)) if one is not None}

    def _batches(
        self, opened: Mapping[int, Opened], counts: Sequence[int], max_tokens: int
    ) -> Iterator[list[int]]:
        """Group prompts of which as many responses are asked, and which may share a batch."""

        def kind(index: int) -> tuple[int, bool]:
            # Where the context ends a response, its neighbours must not end it before.
            return counts[index], len(opened[index].ids) + max_tokens > self.turns.context

        for (_, alone), group in itertools.groupby(sorted(opened, key=kind), key=kind):
            indices = list(group)
            lengths = [len(opened[i].ids) for i in indices]
            for batch in self.rule.batches(lengths, 1 if alone else self.batch, max_tokens):
                yield [indices[i] for i in batch]

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[list[int]], max_tokens: int, **settings: Any
    ) -> dict[str, Any]:
        """Return what transformers gives, and the ids after the prompts as "new"."""
        longest, device = max(map(len, prompts)), self.network.device
        pad = self.chat.tokenizer.pad_token_id or 0
        padded = [[pad] * (longest - len(ids)) + ids for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        if self.turns.texts:
            settings |= {"stop_strings": self.turns.texts, "tokenizer": self.chat.tokenizer}
        self.rule.reset()
        output = self.network.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=min(max_tokens, self.turns.context - longest),
            eos_token_id=sorted(self.turns.ids) or None,
            pad_token_id=pad,
            return_dict_in_generate=True,
            **settings,
        )
        return {**output, "new": output.sequences[:, longest:].tolist()}
