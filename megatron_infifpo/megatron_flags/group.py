"""A group of Megatron's flags, and the class of each flag in it."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field

# Classes of flags.
WORKS = "works"  # passed on, and takes effect
GPU = "gpu"  # the same, but on GPUs only: gpu-check runs them, and a CPU refuses them
CHECKPOINT = "checkpoint"  # the architecture: set from the checkpoint, which nothing may contradict
FIXED = "fixed"  # set by the program, which refuses another value
DEVICE = "device"  # set by the program on a CPU; refused on GPUs, for a reason
REFUSED = "refused"  # for a reason

# Reasons that many flags share, as what follows "--flag is not supported: ".
NO_EFFECT = "it has no effect"
UNPROVEN = "it has not been seen to work with packed rows"
ARCHITECTURE = "it is part of the architecture of models that do not convert"
ROUTER = "no converted model's router does so"
CHANCE = "log-probs would depend on chance"
CAPACITY = "log-probs would depend on what else is in a row"
DISPATCH = "experts are reached by an exchange between all their ranks, and other ways are unproven"
CONTEXT = "packed rows are cut by this program, for the flag --context-parallel-size alone"
HEAD = "the log-prob head takes the place of Megatron's output layer and cross-entropy"
SHARD = "the log-prob head reads the whole shard of the output layer"
FSDP = f"it is for FSDP, where {SHARD}"
WEIGHTS = "weights come from the checkpoint"
GRAPHS = "CUDA graphs need rows of one length"
BUFFERS = "its buffers have one size, and rows have lengths of their own"
SOFTMAX = "attention scales once, and its softmax is float32 in any case"
LOGITS = "the packed attention does not keep its logits"
OPTIMIZER = "only adam and sgd are supported"
INFERENCE = "it is for generating text with Megatron"
PRIVATE = "it needs a library that NVIDIA keeps to itself"


@dataclass(frozen=True)
class Group:
    """The flags of one of Megatron's argument groups, under their names in the arguments.

    `*` ends a name that stands for several flags.

    Attributes:
        works, gpu, checkpoint, fixed: names of the flags of these classes.
        device: from a reason to names.
        refused: from a reason to names.
        rest: why all flags that are not named are refused; None where each must be named.
        optional: Megatron has the group only where some library is installed.
    """

    works: str = ""
    gpu: str = ""
    checkpoint: str = ""
    fixed: str = ""
    device: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    rest: str | None = None
    optional: bool = False

    def named(self) -> list[tuple[str, str, str]]:
        """Name, class and reason of everything that the group names."""
        listed = {WORKS: self.works, GPU: self.gpu, CHECKPOINT: self.checkpoint, FIXED: self.fixed}
        found = [(name, kind, "") for kind, names in listed.items() for name in names.split()]
        for kind, reasons in ((DEVICE, self.device), (REFUSED, self.refused)):
            found += [(name, kind, why) for why, names in reasons.items() for name in names.split()]
        return found

    def classify(self, name: str) -> tuple[str, str] | None:
        """Return the class of a flag and the reason, "" where it has none.

        A name in full goes before one that ends with `*`.

        Returns:
            None: the table does not have the flag.
        """
        found = {key: (kind, why) for key, kind, why in self.named()}
        if name in found:
            return found[name]
        for pattern, answer in found.items():
            if pattern.endswith("*") and fnmatch.fnmatchcase(name, pattern):
                return answer
        return None if self.rest is None else (REFUSED, self.rest)
