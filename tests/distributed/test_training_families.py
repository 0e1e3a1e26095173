"""Families with layers of their own train alike at every layout, and as transformers does."""

import math

import pytest
import tiny
import torch
from test_training import LAYOUTS, steps_of

from megatron_infifpo.data.preference_dataset import PreferenceDataset


@pytest.fixture(scope="module")
def pivots(setup, ranks, tmp_path_factory):
    """Imported tiny pivots by family, for pairs tokenized with the common tokenizer."""
    folder = tmp_path_factory.mktemp("pivots")
    made = {}

    def get(family: str):
        if family not in made:
            hf = tiny.save_model(folder / f"{family}-hf", family, seed=4)
            argv = ["import", "--hf", str(hf), "--save", str(folder / family)]
            ranks(1, "workers:run_tool", "convert_checkpoint", argv)
            made[family] = hf, folder / family
        return made[family]

    return get


def flags(setup, pivot, *more: str) -> list[str]:
    argv = setup.flags(setup.records, "--method", "sft", "--pretrained-checkpoint", str(pivot))
    argv += ["--global-batch-size", "20", "--micro-batch-size", "5", "--train-iters", "1", *more]
    position = argv.index("--preference-sources")
    return argv[:position] + argv[position + 2 :]


def expected(setup, hf) -> tuple[float, float]:
    """transformers' loss over all chosen responses, and the norm of its gradient."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    data, total, count = PreferenceDataset(setup.data, responses=1), 0.0, 0
    for i in range(len(data)):
        pair = data[i]
        prompt, response = pair.prompt_ids.tolist(), pair.response_ids[0].tolist()
        labels = torch.tensor([[-100] * len(prompt) + response])
        loss = model(torch.tensor([prompt + response]), labels=labels).loss * len(response)
        loss.backward()
        total, count = total + loss.item(), count + len(response)
    norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters()))
    return total / count, norm / count


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "mistral-window"])
def test_gradients(setup, ranks, pivots, family):
    """Norms of heads, norms after layers, windows, two ropes: loss and gradient at every layout."""
    hf, pivot = pivots(family)
    loss, norm = expected(setup, hf)
    layouts = ["tp1", "tp2", "tp2-sp", "pp2"] if family != "llama" else ["tp1"]
    for layout in layouts:
        world, more = LAYOUTS[layout]
        got = ranks(world, "workers:train", flags(setup, pivot, *more))
        assert steps_of(got)[0]["loss"] == pytest.approx(loss, abs=1e-5), layout
        assert got[0]["norms"][0] == pytest.approx(norm, rel=1e-4), layout
