"""What `merge` does: a job, checked when it is made."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo.convert.hf_shards import SHARD_BYTES
from megatron_infifpo.convert.merging import MERGES, all_options, parameters
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_choice, check_types, flag
from megatron_infifpo.options import Option, declared
from megatron_infifpo.storage.checkpoints import DTYPE_NAMES, check_free


@dataclass(frozen=True)
class MergeJob:
    """What is merged, and how; checked when it is made.

    Attributes:
        method: a key of `MERGES`.
        base: the Hugging Face folder that all models were trained from; the configuration and the
            tokenizer are its.
        models: Hugging Face folders. Their order changes nothing.
        output: folder to write; must not exist, or be empty.
        weights: one for each model, of methods that take them; None: all equal.
        select_top, select, scale: options of methods; None: their defaults.
        dtype: of the weights written; None: that of the weights read, if it is one.
        shard_bytes: size at which a new safetensors file begins.
    """

    method: str
    base: str
    models: Sequence[str]
    output: str
    weights: Sequence[float] | None = None
    select_top: float | None = None
    select: str | None = None
    scale: float | None = None
    dtype: torch.dtype | None = None
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        """Check what can be checked without reading weights.

        Raises:
            UserError: a value that makes no sense, a flag without effect, a model that is given
                twice, or nowhere to write.
        """
        check_types(self)
        check_choice("method", self.method, MERGES)
        if not self.models:
            raise UserError("--models is empty, expected folders of models to merge")
        for name, users in all_options().items():
            self._check_option(name, users)
        if self.weights is not None:
            self._check_weights(self.weights)
        if self.dtype not in (None, *DTYPE_NAMES.values()):
            raise UserError(f"--dtype is {self.dtype}, expected one of {', '.join(DTYPE_NAMES)}")
        self._check_folders()

    def _check_option(self, name: str, users: dict[str, Option]) -> None:
        """Refuse an option that another method has, or a value out of its range."""
        value = getattr(self, name)
        if value is None:
            return
        if self.method not in users:
            raise UserError(
                f"{flag(name)} has no effect with --method {self.method}: it belongs to "
                f"{', '.join(users)}; leave it out"
            )
        if expected := users[self.method].expected(value):
            raise UserError(f"{flag(name)} is {value!r}, expected {expected}")

    def _check_weights(self, weights: Sequence[float]) -> None:
        """Refuse weights of a method that finds its own, or that make no mean."""
        if "weights" not in parameters(self.method):
            raise UserError(
                f"--weights has no effect with --method {self.method}, which finds the weights by "
                "itself, tensor by tensor: leave it out"
            )
        for weight in weights:
            if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
                raise UserError(f"--weights has {weight!r}, expected finite numbers")
        if len(weights) != len(self.models):
            raise UserError(
                f"--weights has {len(weights)} numbers for {len(self.models)} models, expected "
                "one for each, in the order of --models"
            )
        if self.method == "linear" and (min(weights) < 0 or not sum(weights)):
            raise UserError(
                f"--weights is {list(weights)}, expected numbers of at least 0, not all 0, whose "
                "shares of their sum are the models' parts in the mean"
            )

    def _check_folders(self) -> None:
        """Refuse folders that are given twice, and an output that cannot be made."""
        output, seen = Path(self.output).resolve(), set()
        for name, folder in self.named:
            path = Path(folder).resolve()
            if path in seen:
                raise UserError(f"{name} {folder} is given twice, expected folders that differ")
            seen.add(path)
            if output.is_relative_to(path):
                raise UserError(
                    f"--output {self.output} is in {name} {folder}: expected a folder outside of "
                    "what is read"
                )
        check_free(self.output, "--output")

    @property
    def named(self) -> list[tuple[str, str]]:
        """The base and the models, each with the flag that names it."""
        return [("--base", self.base), *(("--models", folder) for folder in self.models)]

    @property
    def options(self) -> dict[str, Any]:
        """The method's options, defaults filled in."""
        found = declared(MERGES[self.method])
        given = {name: getattr(self, name) for name in found}
        return {n: found[n].default if value is None else value for n, value in given.items()}
