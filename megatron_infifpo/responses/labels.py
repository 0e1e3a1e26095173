"""Scores of responses, and the preference pairs that follow from them."""

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch

from megatron_infifpo import cpu
from megatron_infifpo.cli import UserError
from megatron_infifpo.data.record_files import iter_raw
from megatron_infifpo.data.records import BadRecordError, PreferenceRecord, reply
from megatron_infifpo.data.tokenization import fold_system
from megatron_infifpo.responses.prompts import Prompt, parse_prompt

Scorer = Callable[[Prompt, Sequence[str]], list[float]]
"""Takes a prompt and responses to it; returns a score for each, higher is better."""


@dataclass
class Responses:
    """All responses to one prompt.

    Attributes:
        prompt: the prompt.
        texts: `[N]`, none empty, no two the same but for outer white space.
        models: who gave each, `[N]`.
    """

    prompt: Prompt
    texts: list[str] = field(default_factory=list)
    models: list[set[str]] = field(default_factory=list)

    def add(self, text: str, model: str) -> None:
        """Add a response, or a model to those that gave it."""
        known = [other.strip() for other in self.texts]
        if text.strip() in known:
            self.models[known.index(text.strip())].add(model)
        elif text.strip():
            self.texts.append(text)
            self.models.append({model})


def read_responses(paths: Sequence[str | Path]) -> dict[str, Responses]:
    """Join the files that tools/sample_responses.py wrote, by the prompts' ids.

    Raises:
        UserError: not such a file, or two prompts have one id.
    """
    found: dict[str, Responses] = {}
    for path in paths:
        for raw in iter_raw(Path(path)):
            value = raw.value
            texts = value.get("responses") if isinstance(value, dict) else None
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError(
                    f"{raw.where}: {raw.error or 'no list of responses'}, expected a line written "
                    "by tools/sample_responses.py"
                )
            try:
                prompt = parse_prompt(value, f"{raw.stem}-{raw.index}")
            except BadRecordError as error:
                raise UserError(f"{raw.where}: {error}") from None
            known = found.setdefault(prompt.id, Responses(prompt))
            if known.prompt.messages != prompt.messages:
                raise UserError(f"{raw.where}: {prompt.id!r} is another prompt than before")
            for text in texts:
                known.add(text, str(value.get("model", raw.stem)))
    return found


def choose_pair(
    responses: Responses, scores: Sequence[float], pivot: str | None
) -> PreferenceRecord | str:
    """Best and worst of all responses, and the pivot's own best; the first one wins ties.

    The worst is another than the pivot's best, as a record asks for.

    Args:
        responses: N of them.
        scores: `[N]`.
        pivot: name of the pivot in the responses, for WRPO; or None.

    Returns:
        The record, or why there is none.
    """
    if len(scores) < 2:
        return "fewer than two different responses"
    if not all(map(_is_number, scores)):
        return "a score is not a finite number"
    if max(scores) == min(scores):
        return "no contrast: all scores are equal"
    own = [i for i, models in enumerate(responses.models) if pivot in models]
    if pivot is not None and not own:
        return f"no response of the pivot {pivot}"
    own_best = max(own, key=lambda i: scores[i], default=None)
    best = scores.index(max(scores))
    worst = [i for i, score in enumerate(scores) if score < scores[best] and i != own_best]
    if not worst:
        return "no response is worse than the best but the pivot's best one"
    worst_one = min(worst, key=lambda i: scores[i])
    prompt, texts = responses.prompt, responses.texts
    pivot_chosen = None if own_best is None else reply(texts[own_best])
    return PreferenceRecord(
        prompt.id,
        prompt.domain,
        prompt.messages,
        reply(texts[best]),
        reply(texts[worst_one]),
        pivot_chosen,
    )


def _is_number(score: Any) -> bool:
    return isinstance(score, int | float) and abs(score) < float("inf")


def program_scorer(name: str) -> Scorer:
    """Load `FILE.py:FUNCTION`; it takes (prompt, response) and returns a number.

    Raises:
        UserError: there is no such function.
    """
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"--program {name}: expected FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location("scorer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    score = getattr(module, function, None)
    if not callable(score):
        raise UserError(f"--program {name}: {path} has no function {function!r}")

    def scores(prompt: Prompt, texts: Sequence[str]) -> list[float]:
        return [score(prompt, text) for text in texts]

    return scores


def reward_scorer(model: str, *, bf16: bool, batch: int, trust_remote_code: bool) -> Scorer:
    """Load a reward model: a sequence classifier with one score and a chat template.

    Raises:
        UserError: it is none.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    network: Any = AutoModelForSequenceClassification.from_pretrained(
        model,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    labels, head = network.config.num_labels, hasattr(network, "score")
    if labels != 1 or not head or not tokenizer.chat_template:
        raise UserError(
            f"{model} has {labels} labels, {'a' if head else 'no'} score of the last token, "
            f"{'a' if tokenizer.chat_template else 'no'} chat template: expected a causal reward "
            "model, with one score and a chat template"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    network.to(cpu.device()).eval()

    def render(chat: list[dict[str, str]]) -> str:
        try:
            return str(tokenizer.apply_chat_template(chat, tokenize=False))
        except jinja2.TemplateError:  # Gemma's knows no system messages
            return str(tokenizer.apply_chat_template(fold_system(chat), tokenize=False))

    def scores(prompt: Prompt, texts: Sequence[str]) -> list[float]:
        chats = [[*prompt.messages, {"role": "assistant", "content": text}] for text in texts]
        rendered = [render(chat) for chat in chats]
        found = []
        for start in range(0, len(rendered), batch):
            # The template writes the BOS.
            inputs = tokenizer(
                rendered[start : start + batch],
                add_special_tokens=False,
                padding=True,
                padding_side="right",
                return_tensors="pt",
            ).to(network.device)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            with torch.inference_mode():
                hidden = network.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
                # Not by the padding's id, as transformers looks for it: it may end a turn, too.
                last = hidden[torch.arange(len(ids)), mask.sum(dim=1) - 1]
                found += network.score(last)[:, 0].float().tolist()
        return found

    return scores


def label(
    all_responses: Iterable[Responses],
    scorer: Scorer,
    scorer_name: str,
    cache: Path,
    pivot: str | None,
    dropped: Counter[str],
) -> Iterator[PreferenceRecord]:
    """Yield the pairs; scores are kept in a file, so that an interrupted job goes on.

    Args:
        all_responses: by prompt.
        scorer: called for prompts whose scores are not there yet.
        scorer_name: what it is; scores of another one are not used.
        cache: JSON lines `{"id", "scorer", "models", "responses", "scores"}`.
        pivot: see `choose_pair`.
        dropped: counts prompts that give no pair, by reason.
    """
    known = _read_cache(cache, scorer_name)
    with cache.open("a", encoding="utf-8") as file:
        for responses in all_responses:
            texts, name = responses.texts, responses.prompt.id
            before = known.get(name)
            if before is not None and before["responses"] == texts:
                scores = before["scores"]
            else:
                scores = scorer(responses.prompt, texts) if texts else []
                models = [sorted(models) for models in responses.models]
                entry = {"id": name, "scorer": scorer_name, "models": models, "responses": texts}
                print(json.dumps(entry | {"scores": scores}), file=file, flush=True)
            found = choose_pair(responses, scores, pivot)
            if isinstance(found, str):
                dropped[found] += 1
            else:
                yield found


def _read_cache(path: Path, scorer_name: str) -> dict[str, Any]:
    """Read the scores that are there; the last line may have been cut short."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("scorer") == scorer_name:
            found[entry["id"]] = entry
    return found
