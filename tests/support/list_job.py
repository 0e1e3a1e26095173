"""Lists of responses with all that a run reads of them, without any model: log-probs are drawn."""

from pathlib import Path
from typing import Any

from megatron_infifpo.records.records import PreferenceRecord, read_records
from megatron_infifpo.references.sources import SourcesConfig, read_sources
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.prepare import PreparationJob, prepare
from support.datasets import byte_tokenizer, write_jsonl, write_scores

WEIGHTS = {"a": 2.0, "b": 1.0, "initial": 0.5}
MASKED = 2  # the record that source b has no log-probs of; and b knows no law
DOMAINS = ("math", "code", "law")


def line(number: int) -> dict[str, Any]:
    """A list of 2 to 5 responses: some without a score, some cut, some with equal scores."""
    count = 2 + number % 4
    scores: list[float | None] = [float((number * 3 + i * 5) % 4) for i in range(count)]
    if number % 5 == 4:
        scores[number % count] = None
    if number % 7 == 6:
        scores = [1.5] * count
    return {
        "id": f"q{number}",
        "domain": DOMAINS[number % 3],
        "prompt": "why? " * (1 + number % 3),
        "responses": [f"{'so ' * (1 + (number + 2 * i) % 4)}{number} {i}" for i in range(count)],
        "scores": scores,
        "finish_reasons": ["length" if i and number % 4 == 3 else "stop" for i in range(count)],
    }


class ListJob:
    """Files of a job on lists.

    Attributes:
        folder: of all files.
        records: their file.
        data: prefix of the token data set.
        sources: sources.yaml, of two sources with weights.
    """

    def __init__(self, folder: Path, count: int = 24):
        """Write them."""
        self.folder, self.data, self.sources = folder, folder / "data", folder / "sources.yaml"
        self.records = write_jsonl(folder / "lists.jsonl", *(line(i) for i in range(count)))
        byte_tokenizer().save_pretrained(folder / "tokenizer")
        tokens = self.prepare()
        lengths, records = tokens.scored_lengths, self.read()
        more = {"tokenizer": tokens.manifest["tokenizer"]}
        write_scores(folder / "pivot", records, lengths, **more)
        write_scores(folder / "a", records, lengths, seed=1, **more)
        write_scores(folder / "b", records, lengths, seed=2, masked=[MASKED], **more)
        write_scores(folder / "trained", records, lengths, seed=3, **more)
        self.sources.write_text(
            f"initial: {{logprobs: pivot, weight: {WEIGHTS['initial']}}}\nsources:\n"
            f"  - {{name: a, logprobs: a, weight: {WEIGHTS['a']}}}\n"
            f"  - {{name: b, logprobs: b, weight: {WEIGHTS['b']}, domains: [math, code]}}\n"
        )

    def prepare(self) -> TokenDataset:
        """Tokenize the records, again if need be."""
        job = PreparationJob([str(self.records)], str(self.folder / "tokenizer"), str(self.data))
        return prepare(job)

    def read(self) -> list[PreferenceRecord]:
        """The records."""
        return read_records(self.records)

    @property
    def config(self) -> SourcesConfig:
        """The sources."""
        return read_sources(self.sources)
