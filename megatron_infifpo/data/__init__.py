"""Preference pairs on disk and in batches.

Top to bottom: `records` reads files, `tokenization` makes token ids, `token_dataset` and
`logprob_store` keep data in Megatron's indexed format, `preference_dataset` joins the pivot's
tokens with every model's log-probs, `batching` packs pairs into rows.
"""
