"""Open the tokenizers of the pivot and of sources again, and map their ids."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.fusing.source import FusingSource
from megatron_infifpo.fusing.vocabulary import Vocabulary
from megatron_infifpo.tokens.tokenization import ChatTokenizer


def reopen(
    description: dict[str, Any], path: str | None, flag: str, trust_remote_code: bool
) -> ChatTokenizer:
    """Open a tokenizer that a manifest describes; see `ChatTokenizer.reopen`.

    Raises:
        UserError: it is not there, or another one is; names the flag that says where it is now.
    """
    if description.get("tokenizer_sha256") is None:
        raise UserError(
            f"a manifest says nothing of its tokenizer ({flag} cannot help): expected log-probs "
            "that infifpo score has computed"
        )
    try:
        return ChatTokenizer.reopen(description, path, trust_remote_code=trust_remote_code)
    except UserError as error:
        raise UserError(f"{error}; {flag} says where it is now") from None


def map_sources(
    sources: Sequence[FusingSource],
    pivot: ChatTokenizer,
    ambiguous: str,
    folders: Mapping[str, str],
    *,
    trust_remote_code: bool,
) -> list[np.ndarray]:
    """Map the ids of all sources onto the pivot's.

    Args:
        sources: get their maps.
        pivot: the pivot's tokenizer.
        ambiguous: one of `vocabulary.AMBIGUOUS`.
        folders: where the tokenizers of sources are now, by name.
        trust_remote_code: run code that comes with the tokenizers.

    Returns:
        The groups of ids that all of these maps name.

    Raises:
        UserError: a tokenizer is not there, or its tokens are no bytes; a name of no source.
    """
    names = [source.name for source in sources]
    for name in folders:
        if name not in names:
            raise UserError(
                f"--source-tokenizer names {name!r}, expected one of {', '.join(names)}"
            )
    vocabulary, groups = Vocabulary.of(pivot), list[np.ndarray]()
    numbers: dict[bytes, int] = {}
    for source in sources:
        own = vocabulary
        description = source.store.manifest["tokenizer"]
        if description["tokenizer_sha256"] != vocabulary.identity or source.name in folders:
            flag = f"--source-tokenizer {source.name}=DIR"
            own = Vocabulary.of(
                reopen(description, folders.get(source.name), flag, trust_remote_code)
            )
        # One tokenizer may serve templates that end their turns with different tokens.
        ends = source.store.manifest["top_k"]["end_of_turn_ids"]
        source.map_ids(replace(own, end_of_turn_ids=ends), vocabulary, ambiguous)
        # The same ids are one group, whichever source has it.
        found = np.zeros(len(source.map.groups), np.int32)
        for i, group in enumerate(source.map.groups):
            found[i] = numbers.setdefault(group.tobytes(), len(numbers))
            if found[i] == len(groups):
                groups.append(group)
        ids = source.map.ids.copy()
        ids[ids <= -2] = -(found[-(ids[ids <= -2] + 2)] + 2)
        source.map = replace(source.map, ids=ids)
    return groups
