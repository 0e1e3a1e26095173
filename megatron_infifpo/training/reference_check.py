"""Refuse references that belong to another pivot than the one that training starts from."""

import argparse
import warnings
from pathlib import Path

from megatron_infifpo.checkpoint.fingerprint import weights_fingerprint
from megatron_infifpo.checkpoint.layout import TRACKER
from megatron_infifpo.cli import UserError
from megatron_infifpo.data.preference_dataset import PreferenceDataset


def check_initial_weights(
    args: argparse.Namespace, pivot: Path, dataset: PreferenceDataset
) -> None:
    """Compare the weights that a fresh run starts from with those that scored as initial pivot.

    Reads the checkpoint once, on rank 0. A resumed run has moved away from them and is not checked.

    Args:
        args: validated arguments.
        pivot: the checkpoint that the run loads.
        dataset: the training pairs with their log-probs.

    Raises:
        UserError: other weights, unless `--reference-check` is warn or off.
    """
    initial = dataset.initial
    if args.reference_check == "off" or args.rank != 0 or initial is None:
        return
    given = args.pretrained_checkpoint
    starts_here = given is not None and pivot == Path(given)
    converted = (pivot / TRACKER).read_text(encoding="utf-8").strip() == "release"
    if not (starts_here or converted or args.finetune):
        return
    expected = initial.manifest["weights_sha256"]
    if expected is None:
        warnings.warn(
            f"the log-probs in {initial.prefix} were imported: nothing shows that they are of the "
            f"weights in {pivot}; score the pairs with --model {pivot} to be sure",
            stacklevel=2,
        )
        return
    found = weights_fingerprint(pivot)
    if found == expected:
        return
    message = (
        f"the log-probs in {initial.prefix} are of other weights ({expected[:12]}) than {pivot} "
        f"({found[:12]}), so they are not the initial pivot's: score the pairs with --model "
        f"{pivot}, or pass --reference-check off if you want another reference"
    )
    if args.reference_check == "warn":
        warnings.warn(message, stacklevel=2)
    else:
        raise UserError(message)
