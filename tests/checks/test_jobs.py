"""Jobs of checks, as Python makes them: what is refused, and what a result says."""

import math

import pytest

from megatron_infifpo.checks.conversion import Difference, Verification, VerificationJob
from megatron_infifpo.checks.data import DataJob
from megatron_infifpo.errors import UserError


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size is 0, expected a whole"),
        ({"tolerance": -1.0}, "--tolerance is -1.0, expected a number of at least 0"),
        ({"tolerance": math.nan}, "--tolerance is nan"),
        (
            {"by_layers": True, "pipeline_model_parallel_size": 2},
            "--pipeline-model-parallel-size has no effect with --by-layers",
        ),
    ],
)
def test_verifications_that_cannot_be(change, said):
    VerificationJob("hf", "load")
    with pytest.raises(UserError, match=said):
        VerificationJob("hf", "load", **change)


def test_tolerances():
    whole, half = VerificationJob("hf", "load"), VerificationJob("hf", "load", bf16=True)
    exact = VerificationJob("hf", "load", tolerance=0.0, bf16=True)

    def of(size, mean=0.0):
        return Difference(text=0, token=1, hf=-1.0, megatron=-1.0 - size, mean=mean, tokens=9)

    for experts in (False, True):
        assert whole.accepts(of(0.0009), experts) == (True, "0.001")
        assert not whole.accepts(of(0.0011), experts)[0]
        assert not exact.accepts(of(1e-9), experts)[0]
    assert half.accepts(of(0.49, 0.4), False) == (True, "0.5")
    assert not half.accepts(of(0.51), False)[0]
    assert half.accepts(of(2.2, 0.29), True)[0] and not half.accepts(of(0.4, 0.31), True)[0]


def test_what_a_verification_says():
    """One rank has the numbers; the others have the verdict alone."""
    worst = Difference(1, 2, -0.5, -0.25, 0.125, 30)
    found = Verification(False, "0.1", worst, "the", weights="all weights are equal to the bit")
    assert found.sentences() == [
        "30 tokens: mean difference 1.25e-01, largest 2.50e-01 at text 1, token 2 'the': Hugging "
        "Face -0.500000, Megatron -0.250000",
        "MISMATCH: above the tolerance of 0.1",
        "all weights are equal to the bit",
    ]
    assert Verification(False).sentences() == []


def test_weights_of_what():
    with pytest.raises(UserError, match="--weights has no effect without --sources"):
        DataJob("data/train", weights={"qwen": "models/qwen"})
