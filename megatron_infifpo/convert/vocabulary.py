"""Whether a Hugging Face folder's tokenizer fits its model."""

import json
from pathlib import Path


def warn_of_tokens_beyond(folder: Path, vocabulary: int) -> str | None:
    """Say so if the tokenizer has tokens that the model has no row for; None if it has not.

    Args:
        folder: with tokenizer.json; without it, and of broken ones, nothing is known here.
        vocabulary: number of the model's tokens.
    """
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        ids = [int(token["id"]) for token in content.get("added_tokens") or ()]
        vocab = content["model"]["vocab"]
        ids.append(max(vocab.values()) if isinstance(vocab, dict) else len(vocab) - 1)
        largest = max(ids)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if largest < vocabulary:
        return None
    return (
        f"the tokenizer in {folder} has ids up to {largest}, the model {vocabulary} tokens; "
        "data that use the ones beyond will be refused: give the model rows for them "
        "(resize_token_embeddings) and import it again if they are meant to be trained"
    )
