"""FuseRLHF finds the best policy where all responses can be counted, whatever they are drawn from.

Through the whole program: the real head, Megatron's training, checkpoints and exports.
"""

import numpy as np
import pytest

from support.runs import steps_of
from support.toy import PROMPTS, RESPONSES, Toy, save_pivot

STEPS, ROUNDS = 240, 4


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Toy(save_pivot(tmp_path_factory.mktemp("toy") / "hf"))


@pytest.fixture(scope="module")
def pivot(toy, ranks):
    folder = toy.hf.parent / "pivot"
    argv = ["import", "--hf", str(toy.hf), "--save", str(folder)]
    ranks(1, "support.tools:run_tool", "convert_checkpoint", argv)
    return folder


def flags(pivot, save, *more: str) -> list[str]:
    return [
        "--pretrained-checkpoint", str(pivot), "--save", str(save), "--train-iters", str(STEPS),
        "--global-batch-size", "8", "--micro-batch-size", "8", "--lr", "5e-3", "--min-lr", "1e-5",
        "--lr-decay-style", "cosine", "--weight-decay", "0", "--seq-length", "16",
        "--log-interval", "20", "--adam-beta2", "0.99", *more,
    ]  # fmt: skip


def exported(ranks, checkpoint, folder):
    ranks(1, "support.tools:export", str(checkpoint), str(folder))
    return folder


def test_off_the_policy(toy, pivot, ranks, tmp_path):
    """From all responses alike, which no policy here draws them as."""
    everything = range(len(RESPONSES))
    data = toy.write(tmp_path / "data", [(i % len(PROMPTS), everything) for i in range(8)])
    steps = steps_of(ranks(1, "support.training:train", [*data, *flags(pivot, tmp_path / "run")]))
    assert toy.distance(toy.hf) > 0.3
    assert steps[0]["residual/std"] > 0.3 and steps[-1]["residual/std"] < 0.01
    assert toy.distance(exported(ranks, tmp_path / "run", tmp_path / "hf")) < 1e-4


def test_on_the_policy(toy, pivot, ranks, tmp_path):
    """Rounds on responses that the policy draws itself; references stay the first pivot's."""
    rng, hf, run = np.random.default_rng(11), toy.hf, tmp_path / "run"
    found = [toy.distance(hf)]
    for number in range(ROUNDS):
        policy, lists = np.exp(toy.policy(hf)), []
        for i in range(64):
            prompt = i % len(PROMPTS)
            drawn = rng.choice(len(RESPONSES), 64, p=policy[prompt] / policy[prompt].sum())
            lists.append((prompt, drawn.tolist()))
        data = toy.write(tmp_path / f"data-{number}", lists)
        stop = ["--stop-at", str((number + 1) * STEPS // ROUNDS), "--next-round"]
        ranks(1, "support.training:train", [*data, *flags(pivot, run, *stop)])
        hf = exported(ranks, run, tmp_path / f"hf-{number}")
        found.append(toy.distance(hf))
    assert found[-1] < 1e-4, found
