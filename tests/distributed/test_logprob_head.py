"""The vocabulary-parallel log-prob head against log_softmax, at TP 1, 2 and 4."""

import pytest
import torch


def oracle(seed: int, vocab: int, padded: int):
    """Plain float64 log_softmax over the real vocabulary, with autograd."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(13, 16, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(padded, 16, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, vocab, (13,), generator=generator)
    upstream = torch.randn(13, generator=generator, dtype=torch.float64)
    logprobs = (hidden @ weight[:vocab].t()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    logprobs.backward(upstream)
    return logprobs.detach(), hidden.grad, weight.grad


# 60 of 64 columns are real; at TP 4 with 20 of 64 the last two shards are padding only.
@pytest.mark.parametrize("vocab", [64, 60, 20])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("chunk_bytes", [2**20, 300])
def test_matches_log_softmax(ranks, world, vocab, chunk_bytes):
    expected, hidden_grad, weight_grad = oracle(7, vocab, 64)
    results = ranks(world, "support.heads:head_gradients", 7, vocab, 64, "float64", chunk_bytes)
    for result in results:
        torch.testing.assert_close(result["logprobs"], expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(result["hidden_grad"], hidden_grad, atol=1e-12, rtol=0)
        assert result["again"] <= 1e-14, "a second backward pass recomputes what the first used up"
    full = torch.cat([result["weight_grad"] for result in results])
    torch.testing.assert_close(full, weight_grad, atol=1e-12, rtol=0)
    assert (full[vocab:] == 0).all(), "padded vocabulary columns must not get a gradient"


# At TP 4 a shard has 7 columns of which 5 or fewer are real, fewer than are asked for.
@pytest.mark.parametrize("own_top", [0, 6])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("chunk_bytes", [2**20, 300])
def test_several_ids_a_row_match_dense_autograd(ranks, world, chunk_bytes, own_top):
    for result in ranks(world, "support.heads:dense_and_split", 23, 28, chunk_bytes, own_top):
        assert max(result.values()) <= 1e-12, result


def test_one_id_a_row_is_the_same_in_both_forms():
    """`[K]` and `[K, 1]`, and a first column beside others: the same bits, gradients too."""
    import torch.distributed as dist

    from megatron_infifpo.logprobs import vocab_parallel_logprobs

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        group = dist.group.WORLD
        assert group is not None
        torch.manual_seed(0)
        hidden, weight = torch.randn(9, 8), torch.randn(40, 8)
        ids = torch.randint(0, 37, (9, 5))
        found = []
        for targets in (ids[:, 0], ids[:, :1], ids):
            parts = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            logps = vocab_parallel_logprobs(
                *parts, targets, vocab_size=37, group=group, chunk_bytes=400
            )
            first = logps.view(9, -1)[:, 0]
            found.append([first, *torch.autograd.grad(first.sum(), parts)])
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))
    finally:
        dist.destroy_process_group()
