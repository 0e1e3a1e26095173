"""Families with layers of their own train alike at every layout, and as transformers does."""

import math

import numpy as np
import pytest
import torch

from megatron_infifpo.records.records import read_records
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.tokens.tokenization import ChatTokenizer, TokenizedRecord
from megatron_infifpo.tokens.writer import write_token_dataset
from support.runs import LAYOUTS, steps_of
from support.tiny import load_weights


class HalfScored(ChatTokenizer):
    """Scores some tokens of a response only, at random."""

    def encode_batch(self, records):
        rng = np.random.default_rng(len(records))

        def mark(ids):
            scored = rng.random(len(ids)) < 0.6
            scored[rng.integers(len(ids))] = True
            return scored

        for found in super().encode_batch(records):
            marks = tuple(map(mark, found.response_ids))
            yield TokenizedRecord(found.prompt_ids, found.response_ids, marks)


@pytest.fixture(scope="module")
def data(setup, tmp_path_factory):
    """The common records, of which some response tokens are not scored."""
    prefix = tmp_path_factory.mktemp("half") / "train"
    records = read_records([setup.records])
    write_token_dataset(records, HalfScored.from_pretrained(setup.hf), prefix)
    return prefix


def flags(setup, data, pivot, *more: str) -> list[str]:
    argv = setup.flags(setup.records, "--method", "sft", "--pretrained-checkpoint", str(pivot))
    argv += ["--preference-data", str(data)]
    argv += ["--global-batch-size", "20", "--micro-batch-size", "5", "--train-iters", "1", *more]
    position = argv.index("--preference-sources")
    return argv[:position] + argv[position + 2 :]


def expected(data, hf) -> tuple[float, float]:
    """transformers' loss over the scored tokens of chosen responses, and its gradient's norm."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    pairs, total, count = PreferenceDataset(data, responses=1), 0.0, 0
    for i in range(len(pairs)):
        pair = pairs[i]
        assert pair.scored is not None
        prompt, response = pair.prompt_ids.tolist(), pair.response_ids[0]
        labels = [-100] * len(prompt) + np.where(pair.scored[0], response, -100).tolist()
        scored = int(pair.scored[0].sum())
        text = torch.tensor([prompt + response.tolist()])
        loss = model(text, labels=torch.tensor([labels])).loss * scored
        loss.backward()
        total, count = total + loss.item(), count + scored
    norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
    return total / count, norm / count


# name -> layouts
FAMILIES = dict.fromkeys(
    ["gemma3", "qwen3", "mistral-window", "granite", "olmo2", "glm4"],
    ["tp1", "tp2", "tp2-sp", "pp2"],
) | {
    "llama": ["tp1"],
    "olmo3": ["tp1", "tp2", "tp2-sp", "pp2", "cp2"],
    "gpt_oss": ["tp1", "tp2-sp", "pp2", "cp2"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(setup, ranks, pivots, data, family):
    """Norms of heads or of all, norms after layers, windows, ropes, multipliers, sinks, biases."""
    hf, pivot = pivots(family)
    loss, norm = expected(data, hf)
    for layout in FAMILIES[family]:
        world, more = LAYOUTS[layout]
        got = ranks(world, "support.training:train", flags(setup, data, pivot, *more))
        assert steps_of(got)[0]["loss"] == pytest.approx(loss, abs=1e-5), layout
        assert got[0]["norms"][0] == pytest.approx(norm, rel=1e-4), layout


def test_norms_over_all_heads_are_saved(setup, ranks, pivots, data, tmp_path):
    """Of which each rank has a part: what two ranks save is what one does, and each part moved."""
    hf, pivot = pivots("olmo2")
    weights = []
    for layout in ("tp1", "tp2-sp"):
        world, more = LAYOUTS[layout]
        saved = ["--save", str(tmp_path / layout), "--export", str(tmp_path / f"{layout}-hf")]
        argv = flags(setup, data, pivot, *more, *saved, "--lr", "1e-2", "--min-lr", "1e-2")
        ranks(world, "support.training:train", argv)
        weights.append(load_weights(tmp_path / f"{layout}-hf"))
    before = load_weights(hf)
    for name, one in weights[0].items():
        apart = (weights[1][name] - one).abs()
        # Adam's first step is as long for gradients that are nothing but rounding.
        assert apart.mean() < 1e-5, name
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            assert apart.max() < 1e-4 and (one - before[name]).abs().min() > 1e-3, name
