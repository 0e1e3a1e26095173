"""A prompt computed once for all responses of a pair: the same losses and gradients."""

import pytest

from support.runs import BOTH, LAYOUTS, steps_of


def first_steps(setup, ranks, layout: str, *more: str) -> tuple[list[dict], list[float]]:
    """Metrics and gradient norms of two steps."""
    world, flags = LAYOUTS[layout]
    sources = setup.sources("both", *BOTH)
    argv = setup.flags(sources, "--train-iters", "2", "--reference-check", "off", *flags, *more)
    results = ranks(world, "support.training:train", argv)
    return steps_of(results), results[0]["norms"]


def assert_same(a, b) -> None:
    for left, right in zip(a[0], b[0], strict=True):
        for name, value in right.items():
            # Ties at the start; waste is the layout's.
            if not name.endswith("rewards/accuracy") and not name.startswith("waste/"):
                assert left[name] == pytest.approx(value, abs=1e-4, rel=1e-5, nan_ok=True), name
    assert a[1] == pytest.approx(b[1], rel=1e-4)


@pytest.fixture(scope="module")
def unshared(setup, ranks):
    return {
        method: first_steps(setup, ranks, "tp1", "--method", method, "--no-share-prompt")
        for method in ("infifpo", "wrpo")
    }


@pytest.mark.parametrize("method", ["infifpo", "wrpo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(setup, ranks, unshared, method, layout):
    """Two responses and three, at every layout."""
    shared = first_steps(setup, ranks, layout, "--method", method, "--share-prompt")
    assert_same(shared, unshared[method])


@pytest.mark.parametrize(
    "family", ["gemma3", "qwen3", "mistral-window", "qwen2-window", "phi3-longrope", "olmo3"]
)
def test_families(setup, ranks, pivots, family):
    """Windows that end inside the prompt or before it, two ropes, partial rotation."""
    _, pivot = pivots(family)
    # transformers gives qwen2's folder a pre-tokenizer that the pairs' tokenizer has not.
    mixed = ["--tokenizer-check", "warn"]
    found = [
        first_steps(setup, ranks, "tp1", "--pretrained-checkpoint", str(pivot), *mixed, flag)
        for flag in ("--share-prompt", "--no-share-prompt")
    ]
    assert_same(*found)


def test_recomputation(setup, ranks, unshared):
    """Megatron runs layers and attention again in the backward pass, with the same row."""
    full = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
    for flags in ([*full, "--recompute-num-layers", "1"], ["--recompute-granularity", "selective"]):
        shared = first_steps(setup, ranks, "tp1", "--share-prompt", *flags)
        assert_same(shared, unshared["infifpo"])
