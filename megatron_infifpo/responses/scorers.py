"""Judges of responses: a reward model, or a function of the user's."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_infifpo.engine.batch_rule import BatchRule
from megatron_infifpo.engine.hf_model import load_classifier
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_positive, check_types
from megatron_infifpo.patches import cpu
from megatron_infifpo.responses.answers import Response
from megatron_infifpo.responses.programs import Scorer, UnjudgedError, program_scorer
from megatron_infifpo.responses.prompts import Prompt
from megatron_infifpo.tokens.chat_template import ChatTemplate, RefusedRecordError
from megatron_infifpo.tokens.hf_tokenizer import load_tokenizer
from megatron_infifpo.tokens.rendering import Renderer
from megatron_infifpo.tokens.special_text import SpecialText


@dataclass(frozen=True)
class Judge:
    """A reward model, or a function of the user's.

    Attributes:
        reward_model: folder of a sequence classifier; None where `program` is one.
        program: `FILE.py:FUNCTION`.
        bf16: the reward model in bfloat16, else float32.
        batch: responses at once.
        trust_remote_code: run code that comes with the model.
    """

    reward_model: str | None = None
    program: str | None = None
    bf16: bool = False
    batch: int = 8
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no judge, or two.

        Raises:
            UserError: it is.
        """
        check_types(self)
        check_positive(self, "batch")
        if (self.reward_model is None) == (self.program is None):
            raise UserError("expected --reward-model or --program: one of them, not both")

    @property
    def identity(self) -> str:
        """What scores follow from: the function's file, or the model and its precision."""
        if self.program:
            code = Path(self.program.rpartition(":")[0]).read_bytes()
            return f"{self.program} {hashlib.sha256(code).hexdigest()}"
        return f"{Path(str(self.reward_model)).resolve()} {'bfloat16' if self.bf16 else 'float32'}"


def open_judge(judge: Judge) -> Scorer:
    """Load a judge.

    Raises:
        UserError: there is none.
    """
    return program_scorer(judge.program) if judge.program else reward_scorer(judge)


def reward_scorer(judge: Judge) -> Scorer:
    """Load a reward model: a sequence classifier with one score and a chat template.

    Raises:
        UserError: it is none.
    """
    model = judge.reward_model
    assert model is not None
    network = load_classifier(
        model,
        dtype=torch.bfloat16 if judge.bf16 else torch.float32,
        trust_remote_code=judge.trust_remote_code,
        device_map={"": cpu.device()},
    )
    tokenizer = load_tokenizer(model, trust_remote_code=judge.trust_remote_code)
    labels, head = network.config.num_labels, hasattr(network, "score")
    if labels != 1 or not head or not tokenizer.chat_template:
        raise UserError(
            f"{model} has {labels} labels, {'a' if head else 'no'} score of the last token, "
            f"{'a' if tokenizer.chat_template else 'no'} chat template: expected a causal reward "
            "model, with one score and a chat template"
        )
    rule = BatchRule(network)
    template = ChatTemplate(tokenizer, model, {})
    renderer = Renderer(template, SpecialText(tokenizer), score="last", reasoning="auto")

    def render(prompt: Prompt, answer: Response) -> str:
        # Its reasoning is not judged, and reward models have seen none.
        chat = [*prompt.messages, replace(answer, reasoning=None).message()]
        try:
            return renderer.conversation(chat, prompt.id, tools=prompt.tools)
        except RefusedRecordError as error:
            reason = "the reward model's chat template refuses it"
            raise UnjudgedError(f"{prompt.id!r}: {reason} ({error.reason})", reason) from None

    def scores(prompt: Prompt, answers: Sequence[Response]) -> list[float]:
        rendered = [render(prompt, answer) for answer in answers]
        # The template writes the BOS.
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        found = [0.0] * len(ids)
        for group in rule.batches([len(one) for one in ids], judge.batch):
            texts = [torch.tensor(ids[i], device=network.device) for i in group]
            padded = pad_sequence(texts, batch_first=True)
            mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
            rule.reset()
            with torch.inference_mode():
                hidden = network.base_model(input_ids=padded, attention_mask=mask)[0]
                # Not by the padding's id, as transformers looks for it: it may end a turn, too.
                last = hidden[torch.arange(len(group)), mask.sum(dim=1) - 1]
                values = network.score(last)[:, 0].float().tolist()
            for i, value in zip(group, values, strict=True):
                found[i] = value
        return found

    return scores
