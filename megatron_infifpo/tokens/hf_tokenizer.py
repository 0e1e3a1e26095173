"""Hugging Face tokenizers: load one, tell one from another."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the sha256 of a Hugging Face tokenizer's vocabulary, merges and normalisers."""
    if hasattr(tokenizer, "backend_tokenizer"):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Settings of the last call, not of the tokenizer.
        content.pop("truncation", None), content.pop("padding", None)
    else:
        added = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items()}
        content = [type(tokenizer).__name__, tokenizer.get_vocab(), added]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load a Hugging Face tokenizer.

    Raises:
        UserError: nothing loadable is there.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises just that; broken files raise anything
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        if not Path(path).is_dir():  # transformers then says that it could not connect
            reason = "there is no such folder"
        raise UserError(
            f"cannot load a tokenizer from {path} ({reason}), expected a folder with "
            "tokenizer.json and tokenizer_config.json"
        ) from None
