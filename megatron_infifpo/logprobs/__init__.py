"""The log-prob head: from hidden states to the log-probs of every response token, at given ids.

Only rows that predict a response token reach the output layer. Their log-probs are computed in
chunks, with the vocabulary split over tensor-parallel ranks: at one id a row, the response's own,
or at several, and at the ids that the model itself finds most probable. The backward pass begins
with the last chunk, which is still there, and recomputes the logits of the others. Peak memory is
O(chunk x V / TP), never O(tokens x V), beside the weight's gradient.

Symbols: `T` tokens of a row, `K` scored tokens, `k` ids of each, `H` hidden size, `V` vocabulary,
`S` segments.
"""

from megatron_infifpo.logprobs.head import (
    TopLogprobs,
    vocab_parallel_logprobs,
    vocab_parallel_top,
)
from megatron_infifpo.logprobs.products import CHUNK_BYTES, chunk_bytes_on
from megatron_infifpo.logprobs.responses import response_logprobs, segment_sums

__all__ = [
    "CHUNK_BYTES",
    "TopLogprobs",
    "chunk_bytes_on",
    "response_logprobs",
    "segment_sums",
    "vocab_parallel_logprobs",
    "vocab_parallel_top",
]
