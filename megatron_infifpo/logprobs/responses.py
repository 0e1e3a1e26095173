"""From the hidden states of a packed row to the log-probs of its responses' tokens."""

from typing import Any

import torch
from torch import Tensor

from megatron_infifpo.logprobs.head import TopLogprobs, vocab_parallel_logprobs, vocab_parallel_top


def response_logprobs(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    config: Any,
    context: dict[str, Any],
    **_: Any,
) -> Tensor | TopLogprobs:
    """Megatron's `output_processor`: log-probs of the response tokens of a packed row.

    Args:
        hidden_states: `[T, 1, H]` (`[T / TP, 1, H]` under sequence parallelism).
        output_layer: Megatron's ColumnParallelLinear over the vocabulary.
        output_weight: the embedding when the two are tied, else None.
        config: the TransformerConfig.
        context: `scored_rows` `[K]`, the rows that predict a response token; `target_ids` `[K]`;
            `vocab_size`; and where wanted `soft_ids` `[K, k]`, more ids; `own_top`, how many of the
            most probable ids; and `top_ids`, true to be told these.

    Returns:
        `[K]` float32; or `[K, 1 + k + own_top]` where there are more ids or the most probable ones;
        with `top_ids` `TopLogprobs`.
    """
    from megatron.core.tensor_parallel import mappings  # here: the rest needs no Megatron

    group = output_layer.tp_group
    # The weight is read without calling the layer, so what Megatron hangs on that call runs here:
    # under --overlap-param-gather it waits until the weight has arrived.
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())
    weight = output_layer.weight if output_weight is None else output_weight
    rows = context["scored_rows"]
    if config.sequence_parallel:
        full = mappings.gather_from_sequence_parallel_region(hidden_states, group=group)
        hidden = full.squeeze(1).index_select(0, rows)
    else:
        # Select first: the backward all-reduce then carries K rows instead of T.
        selected = hidden_states.squeeze(1).index_select(0, rows)
        hidden = mappings.copy_to_tensor_model_parallel_region(selected, group=group)
    targets, soft = context["target_ids"], context.get("soft_ids")
    own_top = context.get("own_top", 0)
    options = {"vocab_size": context["vocab_size"], "group": group}
    if soft is None and not own_top:
        return vocab_parallel_logprobs(hidden, weight, targets, **options)
    ids = targets[:, None] if soft is None else torch.cat([targets[:, None], soft], dim=1)
    found = vocab_parallel_top(hidden, weight, ids, own_top, **options)
    return found if context.get("top_ids") else found.logprobs


def segment_sums(token_logprobs: Tensor, segment_ids: Tensor, segments: int) -> Tensor:
    """Sum token log-probs by response: `[K]` and `[K]` in `[0, S)` to `[S]`."""
    return token_logprobs.new_zeros(segments).index_add(0, segment_ids, token_logprobs)
