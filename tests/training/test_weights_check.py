"""Samples of other weights than a round starts from are refused, where their bytes can tell."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_infifpo.convert.fingerprint import Weights
from megatron_infifpo.errors import UserError
from megatron_infifpo.tokens.measured import MeasuredResponse
from megatron_infifpo.training import start
from megatron_infifpo.training.weights_check import begin_weights_check

OWN = Weights("a" * 64, "bfloat16")


@pytest.fixture
def check(monkeypatch, capsys):
    """Check samples of these weights; return what is said, and how often weights were read."""
    read = []

    def read_weights(folder):
        read.append(folder)
        return OWN

    monkeypatch.setattr(start, "read_weights", read_weights)

    def run(*weights, begins=True, rank=0):
        config = SimpleNamespace(sampler_logprobs="r.measured", reference_check="off")
        given: Any = SimpleNamespace(config=config, layout=SimpleNamespace(rank=rank), lora=None)
        files: Any = "of a checkpoint"
        pivot = start.Start(Path("pivot"), "2", files, resumed=True)
        data: Any = SimpleNamespace(initial=None)
        ids, values = np.ones(2, np.int32), np.zeros(2, np.float32)
        samples = [MeasuredResponse("p", ids, ids, values, "policy", *each) for each in weights]
        begin_weights_check(given, pivot, data, samples, begins=begins)()
        return capsys.readouterr().out, len(read)

    return run


def test_they_are_the_same(check):
    said, read = check(OWN, OWN)
    assert said.startswith("sampler check: r.measured is of the weights in pivot (aaaaaaaaaaaa)")
    assert read == 1


def test_stale(check):
    with pytest.raises(UserError, match=r"other weights \(b{12}, policy\) than .* pivot \(a{12}\)"):
        check(OWN, Weights("b" * 64, "bfloat16"))


def test_another_data_type_cannot_tell(check):
    said, _ = check(Weights("b" * 64, "float32"))
    assert "from weights in float32, and pivot is in bfloat16; log-probs alone" in said


def test_older_files(check):
    said, read = check(())
    assert "r.measured does not name the weights" in said and read == 0


@pytest.mark.parametrize("how", [{"begins": False}, {"rank": 1}])
def test_nothing_to_compare(check, how):
    """Within a round the policy has moved, and one rank reads for all."""
    assert check(Weights("b" * 64, "bfloat16"), **how) == ("", 0)
