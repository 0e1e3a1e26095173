"""Transformer Engine's layers compute what local layers compute, and load what those have saved.

Its Python is real, its kernels are emulated in float32: see te_emulation.py.
"""

import pytest

from megatron_infifpo.families import OWN_LAYERS, megatron_args
from support import experts, tiny

# Nats a token, and of a tensor's largest gradient; float32 in another order of sums. Measured:
# 7.2e-6 and 5.2e-6.
LOGPROBS, GRADIENTS = 1.5e-5, 1e-5
KINDS = ("local", "te")
# Whose cosines and sines are scaled, or neighbouring channels rotated: Transformer Engine's kernel
# does only the latter, and is left out for both.
UNFUSED = ("glm", "glm4", "glm4-unbiased", "gpt_oss", "olmo3", "phi3-longrope", "qwen2-yarn")
LAYERS = tiny.SHAPE["num_hidden_layers"]


def sparse_layers(family: str) -> tuple[int, bool]:
    """How many layers of a tiny model have experts, and whether they have a shared one."""
    args = megatron_args(tiny.config(family, vocab_size=320).to_dict())
    shared = args.get("moe_shared_expert_intermediate_size") is not None
    return (sum(args["moe_layer_freq"]) if args.get("num_experts") else 0), shared


def check(ranks, folder, family):
    """With our attention, prompts shared or not, and with Transformer Engine's own."""
    (found,) = ranks(1, "support.te_layers:family", str(folder), family)
    for run, (logprobs, gradients) in found["differences"].items():
        assert logprobs <= LOGPROBS, run
        assert gradients <= GRADIENTS, run
    assert found["gradients"] >= 6 * LAYERS
    assert found["parameters"] == set()
    assert found["keys"] == {"local": set(), "te": set(), "te-attention": set()}
    calls, sparse, shared = found["calls"], *sparse_layers(family)
    # A router's product is Transformer Engine's on any layers.
    assert calls["local", True] == ({"gemm": 3 * sparse} if sparse else {})
    # Four products a layer, each once forward and twice backward; experts have two for all of them.
    expected = 12 * LAYERS - 6 * sparse * (not shared) + 3 * sparse
    for run, kernels in calls.items():
        if run[0] != "local":
            assert (kernels["gemm"], kernels.get("grouped gemm", 0)) == (expected, 6 * sparse), run
    for run, kernels in calls.items():
        if run[0] != "local":  # queries and keys, both ways
            fused = 0 if family in UNFUSED else 4 * LAYERS
            assert kernels.get("rope", 0) == fused, run
            assert kernels.get("attention", 0) == (LAYERS if run[0] == "te-attention" else 0), run


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_family(newest_te_ranks, tmp_path, family):
    check(newest_te_ranks, tmp_path, family)


@pytest.mark.parametrize("family", ["llama", *OWN_LAYERS, "mistral-window", "qwen3_moe-mixed"])
def test_family_on_the_oldest(oldest_te_ranks, tmp_path, family):
    """Whatever has modules of its own, experts, and a window."""
    check(oldest_te_ranks, tmp_path, family)


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma3", "gpt_oss", "olmo2", "qwen3_moe-mixed", "qwen2_moe"]
)
def test_loading(te_ranks, tmp_path, family):
    """Norms of heads, norms after layers: each has an extra state that some kinds expect."""
    (different,) = te_ranks(1, "support.te_layers:reload", str(tmp_path), family)
    origins = ("imported", "local", "te", "old local")
    assert different == {f"{origin} to {kind}": [] for origin in origins for kind in KINDS}


@pytest.mark.parametrize(
    "family",
    ["llama-tied", "qwen2", "phi3-partial", "qwen2-window", "qwen3", "mistral-window", "gemma3"]
    + ["glm4", "granite", "olmo3", "phi3-longrope"],
)
def test_on_meta(newest_te_ranks, tmp_path, family):
    """Whole models, shared prompts included, never touch the host: `meta` stands for CUDA."""
    (found,) = newest_te_ranks(1, "support.te_layers:on_meta", str(tmp_path), family)
    types = {"local bf16": "bfloat16", "local fp32": "float32", "te bf16": "bfloat16"}
    assert found == {run: ("meta", {("meta", f"torch.{kind}")}) for run, kind in types.items()}


@pytest.mark.parametrize("kind", ["local", "te"])
def test_keys_of_experts(newest_te_ranks, tmp_path, kind):
    """What a checkpoint is to hold, written down; import is held to the same file."""
    (found,) = newest_te_ranks(1, "support.te_layers:keys", str(tmp_path), "qwen3_moe-mixed", kind)
    assert found == experts.golden_keys()


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fp8_takes_rows(te_ranks, recipe, tensor_parallel):
    """By Transformer Engine's own checks, on a rank's share of a row."""
    (found,) = te_ranks(1, "support.te_layers:fp8_rows", recipe, tensor_parallel)
    assert found == {"padded": True, "not padded": False}
