"""Adapters train as PEFT's do, and what is exported gives PEFT's logits."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_infifpo.convert.fingerprint import weights_fingerprint
from megatron_infifpo.convert.hf_import import import_checkpoint
from megatron_infifpo.errors import UserError
from support import lora, runs, tiny
from support.launcher import Ranks
from support.runs import steps_of

TRAIN = "support.training:train"
# Of the usual one a token is so near to two experts that other rounding sends it to the other.
SEEDS = {"gpt_oss": 6}
LAYOUTS = {**runs.LAYOUTS, "ep2": (2, ["--expert-model-parallel-size", "2"])}


class Trained(NamedTuple):
    """A run of two steps, with the PEFT folders of both."""

    hf: Path
    folder: Path
    results: list[dict]


@pytest.fixture(scope="module")
def trained(setup, ranks, pivots, tmp_path_factory):
    """Runs by family, layout and targets; each is made once."""
    made: dict[tuple, Trained] = {}

    def get(family: str, layout: str, targets: str) -> Trained:
        if (family, layout, targets) not in made:
            hf, pivot = pivots(family, SEEDS.get(family, 4))
            folder = tmp_path_factory.mktemp(family)
            results = train(setup, ranks, pivot, layout, targets, folder / "run")
            for step in (1, 2):
                peft = str(folder / str(step))
                ranks(1, "support.lora:export", str(folder / "run"), peft, step)
            made[family, layout, targets] = Trained(hf, folder, results)
        return made[family, layout, targets]

    return get


def train(setup, ranks: Ranks, pivot: Path, layout: str, targets: str, run: Path) -> list[dict]:
    world, more = LAYOUTS[layout]
    argv = setup.flags(
        setup.records, "--method", "sft", "--pretrained-checkpoint", str(pivot),
        "--global-batch-size", "20", "--micro-batch-size", "5", "--train-iters", "2",
        "--tokenizer-check", "off", "--save", str(run), "--save-interval", "1",
        "--lora-rank", "4", "--lora-targets", *targets.split(), *lora.PLAIN, *more,
    )  # fmt: skip
    argv.remove("--use-distributed-optimizer")
    position = argv.index("--preference-sources")
    del argv[position : position + 2]
    return ranks(world, TRAIN, argv)


PHI, GEMMA = ("phi3", "tp2", "all-linear"), ("gemma3", "tp2-sp", "all-linear")
QWEN = ("qwen2", "tp2", "k_proj up_proj down_proj")
# Of models with experts the attention is adapted: all that PEFT adapts there, too.
EXPERTS = ("qwen3_moe-mixed", "ep2", "all-linear")
SINKS = ("gpt_oss", "tp2-sp", "all-linear")
LLAMA = [("llama", layout, "all-linear") for layout in ("tp1", "tp2-sp", "pp2")]


@pytest.mark.parametrize(
    "case", [*LLAMA, PHI, QWEN, GEMMA, EXPERTS, SINKS], ids=lambda case: "-".join(case[:2])
)
def test_gradients(setup, trained, case):
    """The second step's, where neither A nor B is zero, of every adapter."""
    hf, folder, results = trained(*case)
    model = lora.peft_model(hf, folder / "1", trainable=True)
    loss, expected = lora.sft_gradients(model, setup.data)
    assert steps_of(results)[1]["loss"] == pytest.approx(loss, abs=1e-5)
    norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
    assert results[0]["norms"][1] == pytest.approx(norm, rel=1e-4)
    before, after = lora.adapters(folder / "1"), lora.adapters(folder / "2")
    assert before.keys() == after.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        assert largest > 1e-4, name
        found = (before[name] - after[name]) / lora.RATE
        assert (found - gradient).abs().max() < min(1e-5, 1e-3 * largest), name


@pytest.mark.parametrize("case", [PHI, GEMMA, EXPERTS], ids=lambda case: case[0])
def test_exports(ranks, trained, tmp_path, case):
    """Merged, with PEFT, merged on import, and run by Megatron: one model."""
    hf, folder, _ = trained(*case)
    run, peft, merged = folder / "run", folder / "2", tmp_path / "merged"
    ranks(1, "support.tools:export", str(run), str(merged))
    text = torch.arange(3, 60)
    expected = lora.logprobs(lora.peft_model(hf, peft), text)
    untrained = lora.logprobs(lora.transformers_model(hf), text)
    assert (expected - untrained).abs().max() > 0.1
    assert (lora.logprobs(lora.transformers_model(merged), text) - expected).abs().max() < 1e-4
    assert weights_fingerprint(run) == weights_fingerprint(merged) != weights_fingerprint(hf)
    torch.save([lora.row(text)], tmp_path / "row.pt")
    words = ("support.scoring:megatron_logprobs", str(run), str(tmp_path / "row.pt"), 2, 1)
    (found,) = next(filter(None, ranks(2, *words)))
    assert (found - expected).abs().max() < 1e-4
    import_checkpoint(hf, tmp_path / "imported", adapter=peft)
    ranks(1, "support.tools:export", str(tmp_path / "imported"), str(tmp_path / "back"))
    tiny.assert_same_weights(tmp_path / "back", merged)


def test_first_adapters(trained):
    """A is PEFT's uniform one, drawn for each layer and name; the same at every layout."""
    _, folder, _ = trained(*LLAMA[0])
    here, there = (lora.adapters(trained(*case).folder / "1") for case in LLAMA[:2])
    drawn = {name: a for name, a in here.items() if name.endswith("lora_A.weight")}
    for name, a in drawn.items():  # not changed by the first step, where B is 0
        assert torch.equal(a, there[name]), name
        bound = a.shape[1] ** -0.5
        assert 0.9 * bound < a.abs().max() <= bound and a.mean().abs() < 0.2 * bound
    assert len({float(a[0, 0]) for a in drawn.values()}) == len(drawn) == 4 * 7


def test_folders_that_are_no_plain_lora(trained, tmp_path):
    """What would be merged wrongly is refused, and nothing is left."""
    hf, folder, _ = trained(*PHI)

    def refused(match: str, change: dict | None = None, tensors: dict | None = None) -> None:
        peft = Path(shutil.copytree(folder / "2", tmp_path / "peft", dirs_exist_ok=True))
        config = json.loads((peft / "adapter_config.json").read_text()) | (change or {})
        (peft / "adapter_config.json").write_text(json.dumps(config))
        weights = load_file(peft / "adapter_model.safetensors") | (tensors or {})
        weights = {n: t for n, t in weights.items() if t is not None}
        save_file(weights, peft / "adapter_model.safetensors")
        with pytest.raises(UserError, match=match):
            import_checkpoint(hf, tmp_path / "not-to-be", adapter=peft)
        assert not list(tmp_path.glob("*not-to-be*"))

    name = "base_model.model.model.layers.1.mlp.down_proj"
    refused("use_dora is True, which is no plain LoRA", {"use_dora": True})
    refused("rank_pattern is ", {"rank_pattern": {"o_proj": 2}})
    refused("init_lora_weights is 'pissa'", {"init_lora_weights": "pissa"})
    refused("of_tomorrow is True, which is no plain LoRA", {"of_tomorrow": True})
    refused("cannot be read", {"lora_alpha": None})
    refused("lora_A.weight belongs to no linear layer", tensors={f"{name}.lora_B.weight": None})
    refused("of another model", tensors={f"{name}.lora_A.weight": torch.zeros(4, 5)})
    refused("lm_head.lora_A.weight belongs", tensors={"lm_head.lora_A.weight": torch.zeros(4, 5)})
    with pytest.raises(UserError, match="is no PEFT folder: expected adapter_config.json"):
        import_checkpoint(hf, tmp_path / "not-to-be", adapter=hf)
    with pytest.raises(UserError, match="holds an adapter"):
        import_checkpoint(folder / "2", tmp_path / "not-to-be")
