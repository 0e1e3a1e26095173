"""Refuse tokens that are not of the model: of another tokenizer or template, or without a row."""

import warnings
from pathlib import Path

from megatron_infifpo.errors import UserError
from megatron_infifpo.families.architecture import hf_files
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.tokens.hf_tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_infifpo.tokens.tokenization import ChatTokenizer

_NAMES = {"tokenizer_sha256": "tokenizer", "chat_template_sha256": "chat template"}

_FILES = ("tokenizer*", "tekken.json", "vocab.*")


def check_tokens(
    folder: Path, *datasets: PreferenceDataset, vocabulary: int, mode: str = "error"
) -> None:
    """Compare data sets with the tokenizer and the vocabulary of a checkpoint; the first rank's.

    Args:
        folder: of the checkpoint, with its `hf`; or a Hugging Face folder.
        datasets: what is trained and validated on, with their soft targets.
        vocabulary: tokens that the model has; Megatron pads it later.
        mode: `--tokenizer-check`.

    Raises:
        UserError: an id that the model has no row for, in any case; another tokenizer or chat
            template, unless `--tokenizer-check` is warn or off.
    """
    for dataset in datasets:
        tokens, targets = dataset.tokens, dataset.targets
        _check_rows(folder, tokens.prefix, tokens.largest_id(), vocabulary, "Prepare")
        if targets is not None and (largest := targets.largest_id()) is not None:
            _check_rows(folder, targets.prefix, largest, vocabulary, "Prepare and fuse")
    if mode == "off":
        return
    for complaint in _complaints(folder, datasets):
        if mode != "warn":
            raise UserError(complaint)
        warnings.warn(complaint, stacklevel=2)


def _check_rows(folder: Path, prefix: str, largest: int, vocabulary: int, again: str) -> None:
    if largest >= vocabulary:
        raise UserError(
            f"{prefix} holds the token id {largest}, but the model in {folder} has {vocabulary} "
            f"tokens, 0 to {vocabulary - 1}: what is beyond is padding, and never trained. {again} "
            "the data with the model's own tokenizer, or give the model rows for the tokens that "
            "were added to it (resize_token_embeddings) and import it again"
        )


def _complaints(folder: Path, datasets: tuple[PreferenceDataset, ...]) -> list[str]:
    """Say of each data set what differs from the checkpoint's."""
    hf = hf_files(folder)
    if not any(path.is_file() for name in _FILES for path in hf.glob(name)):
        return []  # a model without a tokenizer
    try:
        tokenizer = load_tokenizer(hf)
    except UserError as error:
        return [f"{error}; --tokenizer-check off does not compare it with that of the data"]
    # A base model has no template: then any is the user's choice.
    own = {"tokenizer_sha256": tokenizer_fingerprint(tokenizer)}
    if tokenizer.chat_template:
        own = ChatTokenizer(tokenizer, str(hf)).fingerprint()
    found = []
    for dataset in datasets:
        made = dataset.tokens.manifest["tokenizer"]
        other = [name for key, name in _NAMES.items() if key in own and made[key] != own[key]]
        if other:
            found.append(
                f"{dataset.tokens.prefix} was prepared with another {' and another '.join(other)} "
                f"(from {made['path']}) than the checkpoint's, {hf}: the model would learn texts "
                "that it is never asked with. Prepare the data with --tokenizer "
                f"{hf}, or pass --tokenizer-check warn if you want it so"
            )
    return found
