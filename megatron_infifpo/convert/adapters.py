"""Checkpoints that hold low-rank adapters alone: of which base they are, and reading both."""

from pathlib import Path
from typing import Any, NamedTuple, Self

from megatron_infifpo.convert.model_weights import AdaptedWeights, ModelWeights
from megatron_infifpo.errors import UserError
from megatron_infifpo.families.lora import Lora, is_adapter, key_of
from megatron_infifpo.families.mapping import WeightMapping
from megatron_infifpo.storage.aside import Aside
from megatron_infifpo.storage.manifests import Format
from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint

LORA_FILE = "lora.json"  # beside the checkpoints of a run that trains adapters
FORMAT = Format(
    name="megatron_infifpo adapters",
    version=1,
    made_by="a training run with --lora-rank",
    schema={
        "rank": int,
        "alpha": (float, int),
        "targets": [str],
        "base": {"checkpoint": str, "weights_sha256": str},
    },
)


class Adapters(NamedTuple):
    """What checkpoints of adapters are made for."""

    lora: Lora
    """Their settings."""
    base: Path
    """The folder of the base, where it was when the run began."""
    base_sha256: str
    """The fingerprint of the base's weights."""

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read what a run has written beside its checkpoints.

        Raises:
            UserError: it is missing or broken.
        """
        found = FORMAT.read(directory / LORA_FILE.removesuffix(".json"))
        lora = Lora(found["rank"], float(found["alpha"]), tuple(found["targets"]))
        return cls(lora, Path(found["base"]["checkpoint"]), found["base"]["weights_sha256"])

    def write(self, directory: Path) -> None:
        """Write it there."""
        base = {"checkpoint": str(self.base), "weights_sha256": self.base_sha256}
        content: dict[str, Any] = FORMAT.fields | self.lora.__dict__ | {"base": base}
        with Aside() as files:
            FORMAT.write(directory / LORA_FILE.removesuffix(".json"), content, files)

    def check_base(self, base: Path, sha256: str) -> None:
        """Refuse another base.

        Args:
            base: where it is.
            sha256: its fingerprint.

        Raises:
            UserError: it has other weights.
        """
        if sha256 != self.base_sha256:
            raise UserError(
                f"{base} has other weights ({sha256[:12]}) than the base that the adapters were "
                f"trained on ({self.base_sha256[:12]}, in {self.base}): give that one"
            )


def holds_adapters(checkpoint: TorchDistCheckpoint) -> bool:
    """Whether a checkpoint has adapters, and so nothing else of a model."""
    return any(map(is_adapter, checkpoint.names()))


def adapted(
    checkpoint: TorchDistCheckpoint, mapping: WeightMapping, base: ModelWeights, lora: Lora
) -> AdaptedWeights:
    """Check that a checkpoint holds the adapters of these settings; return base and adapters.

    Raises:
        UserError: an adapter is missing, surplus or of another shape.
    """
    expected = {
        key_of(entry, name): (*(place.size for place in entry.places), *shape)
        for row in lora.rows(mapping)
        for entry in (mapping.entry(row.key, layer) for layer in range(mapping.num_layers))
        for name, shape in lora.shapes(entry).items()
    }
    found = {name: checkpoint.shape(name) for name in checkpoint.names()}
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            raise UserError(
                f"{checkpoint.directory}: {key} is {_shape(found.get(key))}, but {LORA_FILE} of "
                f"the run asks for {_shape(expected.get(key))}: the two are not of one run"
            )
    return AdaptedWeights(base, checkpoint, mapping, lora)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
