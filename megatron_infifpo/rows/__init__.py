"""Preference pairs on disk and in batches.

Top to bottom: `record_files` decodes files, `record_forms` knows the forms that people have,
`records` makes one plain form of them, `tokenization` makes token ids, `token_dataset` and
`logprob_store` keep data in Megatron's indexed format, `preference_dataset` joins the pivot's
tokens with every model's log-probs, `packing` packs pairs into rows, `batching` plans the steps.
"""

from typing import Any

Row = dict[str, Any]
"""The tensors of one packed row by name: what `packing.collate` returns."""
