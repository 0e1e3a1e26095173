"""Preference pairs on disk and in batches.

Top to bottom: `records` reads files, `tokenization` makes token ids, `token_dataset` and
`logprob_store` keep data in Megatron's indexed format, `preference_dataset` joins the pivot's
tokens with every model's log-probs, `batching` packs pairs into rows.
"""

from typing import Any

Row = dict[str, Any]
"""The tensors of one packed row by name: what `batching.collate` returns."""
