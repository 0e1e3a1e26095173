"""Preference pairs in packed rows.

Top to bottom: `preference_dataset` joins the pivot's tokens with every model's log-probs, `layout`
says how pairs lie in a row, `plan` which pairs share one, `packing` makes its tensors, and
`soft_targets` those of what sources say of tokens, if `learnt` finds that the method can use it;
`loaders` hand rows to training.
"""

from typing import Any

Row = dict[str, Any]
"""The tensors of one packed row by name: what `packing.collate` returns."""
