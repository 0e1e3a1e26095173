"""Sample with vLLM, offline, where it is installed."""

from collections.abc import Sequence
from typing import Any

from megatron_infifpo.engine.hf_model import check_whole
from megatron_infifpo.errors import UserError
from megatron_infifpo.responses.answers import FINISH, REFUSED, Response
from megatron_infifpo.responses.engines import EngineOptions, Measured, NotMeasuredError, Sampling
from megatron_infifpo.responses.prompts import Prompt
from megatron_infifpo.responses.turns import Opened, Turns
from megatron_infifpo.tokens.tokenization import ChatTokenizer


class VllmEngine:
    """Samples with vLLM, offline."""

    def __init__(
        self, model: str, chat: ChatTokenizer, how: Sampling, options: EngineOptions
    ) -> None:
        """Load the model.

        Raises:
            UserError: vLLM is not installed, or weights are missing.
        """
        try:
            import vllm
        except ImportError:
            raise UserError(
                "--engine vllm needs vLLM: install it, or choose --engine transformers, or "
                "--engine server with the address of one"
            ) from None
        from transformers import GenerationConfig

        check_whole(model, trust_remote_code=options.trust_remote_code)
        try:
            generation_config: Any = GenerationConfig.from_pretrained(model)
        except OSError:  # there is none
            generation_config = None
        self.network = vllm.LLM(
            model=model,
            tensor_parallel_size=options.tensor_model_parallel_size,
            dtype="bfloat16" if options.bf16 else "float32",
            trust_remote_code=options.trust_remote_code,
        )
        self.how, self.settings = how, vllm.SamplingParams
        engine = getattr(self.network, "llm_engine", None)
        self.turns = Turns(
            chat,
            generation_config,
            context=getattr(getattr(engine, "model_config", None), "max_model_len", None),
            skip=options.skip_refused,
        )

    def sample(
        self, prompts: Sequence[Prompt], counts: Sequence[int], seed: int
    ) -> list[list[Response]]:
        """Return so many responses of each prompt."""
        how = {"temperature": self.how.temperature, "top_p": self.how.top_p}
        settings = [{"n": count, **how} for count in counts]
        return [
            [response for response, _ in answers] or [Response("", REFUSED)]
            for answers in self._generate(
                self.turns.open_all(prompts), settings, self.how.max_tokens, seed
            )
        ]

    def measure(self, prompts: Sequence[Prompt], max_tokens: int, seed: int) -> list[Measured]:
        """Return one response of each prompt with vLLM's log-probs."""
        settings = {"n": 1, "temperature": 1.0, "logprobs": 1}
        found = []
        opened = self.turns.open_all(prompts)
        outputs = self._generate(opened, [settings] * len(prompts), max_tokens, seed)
        for prompt, one, answers in zip(prompts, opened, outputs, strict=True):
            for response, output in answers:
                assert one is not None, "nothing is asked of a prompt that is left out"
                if output.logprobs is None:
                    raise NotMeasuredError("vLLM gives no log-probs")
                ids = self.turns.cut(output.token_ids)
                values = [output.logprobs[i][token].logprob for i, token in enumerate(ids)]
                found.append(Measured(prompt, one.ids, response, ids, values))
        return found

    def _generate(
        self,
        opened: Sequence[Opened | None],
        settings: Sequence[dict[str, Any]],
        max_tokens: int,
        seed: int,
    ) -> list[list[tuple[Response, Any]]]:
        """Return responses, each with what vLLM says of it; none of a prompt that is left out."""
        asked = [(one, how) for one, how in zip(opened, settings, strict=True) if one is not None]
        if not asked:
            return [[] for _ in opened]
        outputs = self.network.generate(
            [{"prompt_token_ids": one.ids} for one, _ in asked],
            [
                self.settings(
                    **how,
                    max_tokens=max_tokens,
                    seed=seed,
                    stop_token_ids=sorted(self.turns.ids),
                    stop=self.turns.texts,
                    skip_special_tokens=False,
                )
                for _, how in asked
            ],
        )
        answers = iter(outputs)
        return [
            []
            if one is None
            else [(self._response(out, one), out) for out in next(answers).outputs]
            for one in opened
        ]

    def _response(self, output: Any, opened: Opened) -> Response:
        finish = output.finish_reason
        return self.turns.response(output.token_ids, opened, FINISH.get(finish, finish))
