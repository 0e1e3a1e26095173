"""Where everything of a run lies.

OUT/run.yaml                    what the run is, as its stages read it
OUT/responses/NAME.jsonl        sampled responses of a model, and records.jsonl from a judge
OUT/data/sft.*, preference.*, heldout.*     records that were split, and token data sets
OUT/sources/TRAINING.yaml       the sources of a training, and the initial pivot that it has
OUT/logprobs/NAME.*             log-prob data sets of the preference records
OUT/logprobs/heldout/NAME.*     and of the held-out ones, by model
OUT/tokens/SPLIT/NAME.*         log-probs with top-k of a split's chosen responses
OUT/tokens/targets/TRAINING.*   and soft targets, fused from them
OUT/NAME, OUT/NAME-hf           a training's checkpoints, and the exported model
OUT/stages/STAGE/               stamp.json: what it was made of; log: what it printed
OUT/evaluation, OUT/heldout.json, OUT/heldout.md
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_infifpo.run.checks import PIVOT


@dataclass(frozen=True)
class Names:
    """Paths of a run, under its folder."""

    output: Path

    @property
    def run(self) -> Path:
        """The run.yaml that stages read."""
        return self.output / "run.yaml"

    def responses(self, name: str) -> Path:
        """Sampled responses of a model."""
        return self.output / "responses" / f"{name}.jsonl"

    def records(self, split: str) -> Path:
        """Records of a split that the run makes."""
        return self.output / "data" / f"{split}.jsonl"

    def tokens(self, split: str) -> Path:
        """Prefix of a split's token data set."""
        return self.output / "data" / split

    def sources(self, training: str) -> Path:
        """The sources.yaml of a training."""
        return self.output / "sources" / f"{training}.yaml"

    def logprobs(self, split: str, name: str) -> Path:
        """Prefix of a model's log-probs."""
        return self.output / "logprobs" / ("heldout" if split == "heldout" else "") / name

    def top(self, split: str, name: str) -> Path:
        """Prefix of a model's log-probs with top-k."""
        return self.output / "tokens" / split / name

    def targets(self, training: str) -> Path:
        """Prefix of a training's soft targets."""
        return self.output / "tokens" / "targets" / training

    def checkpoint(self, training: str) -> Path:
        """The --save folder of a training."""
        return self.output / training

    def exported(self, training: str) -> Path:
        """The Hugging Face folder of a training."""
        return self.output / f"{training}-hf"

    def stage(self, name: str) -> Path:
        """The folder of what is known about a stage."""
        return self.output / "stages" / name

    @property
    def heldout(self) -> Path:
        """The comparison on held-out records."""
        return self.output / "heldout.json"


def manifest(prefix: Path) -> Path:
    """The file of a data set that is written last."""
    return prefix.with_name(f"{prefix.name}.json")


__all__ = ["PIVOT", "Names", "manifest"]
