"""Scores of responses, kept in a file, and the records that follow from them."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_infifpo.records.records import PreferenceRecord
from megatron_infifpo.responses.choosing import NO_NUMBER, is_number
from megatron_infifpo.responses.labels import Responses, judged, rendered
from megatron_infifpo.responses.programs import Scorer, UnjudgedError
from megatron_infifpo.responses.prompts import Prompt

Chooser = Callable[[Responses, Sequence[float]], PreferenceRecord | str]
"""Makes a record of responses and their scores, or says why there is none."""


class LeftOut(Counter[str]):
    """Prompts that give no record, by reason.

    Attributes:
        first: of a reason that is the judge's: what it was of the first prompt.
    """

    def __init__(self) -> None:
        """Count none."""
        super().__init__()
        self.first: dict[str, str] = {}

    def add(self, reason: str, prompt: Prompt, scores: Sequence[float]) -> None:
        """Count a prompt that was judged."""
        self[reason] += 1
        if reason == NO_NUMBER:
            bad = next(score for score in scores if not is_number(score))
            self.first.setdefault(reason, f"{bad!r}, of prompt {prompt.id!r}")

    def lines(self) -> list[str]:
        """Return a line a reason."""
        return [
            f"left out {number}: {reason}"
            + (f"; the first: {self.first[reason]}" if reason in self.first else "")
            for reason, number in self.most_common()
        ]


def label(
    all_responses: Iterable[Responses],
    scorer: Scorer,
    scorer_name: str,
    cache: Path,
    choose: Chooser,
    dropped: LeftOut,
    *,
    skip: bool = False,
) -> Iterator[PreferenceRecord]:
    """Yield the records; scores are kept in a file, so that an interrupted job goes on.

    A text is judged once: equal responses have one score.

    Args:
        all_responses: by prompt.
        scorer: called for prompts whose scores are not there yet.
        scorer_name: what it is; scores of another one are not used.
        cache: JSON lines `{"id", "scorer", "judged_sha256", "models", "responses", "scores"}`.
        choose: makes the record of a prompt.
        dropped: counts prompts that give no record, by reason.
        skip: count a prompt that cannot be judged, too; else it is an error.

    Raises:
        UserError: a prompt cannot be judged.
    """
    known = read_cache(cache, scorer_name)
    with cache.open("a", encoding="utf-8") as file:
        if cache.read_bytes()[-1:] not in (b"", b"\n"):  # the last line was cut short
            file.write("\n")
        for responses in all_responses:
            prompt, texts = responses.prompt, [answer.text for answer in responses.answers]
            seen = json.dumps([*map(judged, responses.answers), rendered(prompt)], default=str)
            digest = hashlib.sha256(seen.encode()).hexdigest()
            before = known.get(prompt.id)
            if before is not None and before.get("judged_sha256") == digest:
                scores = before["scores"]
            else:
                try:
                    scores = scorer(prompt, responses.answers) if texts else []
                except UnjudgedError as error:
                    if not skip:
                        raise
                    dropped[error.reason] += 1
                    dropped.first.setdefault(error.reason, str(error))
                    continue
                entry = {
                    "id": prompt.id,
                    "scorer": scorer_name,
                    "judged_sha256": digest,
                    "models": [sorted(models) for models in responses.models],
                    "responses": texts,
                    "scores": scores,
                }
                print(json.dumps(entry, default=repr), file=file, flush=True)
            found = choose(responses, scores)
            if isinstance(found, str):
                dropped.add(found, prompt, scores)
            else:
                yield found


def read_cache(path: Path, scorer_name: str | None = None) -> dict[str, Any]:
    """Read the scores of one judge, or of any, by prompt; lines may have been cut short."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and scorer_name in (None, entry.get("scorer")):
            found[entry["id"]] = entry
    return found
