"""DPO against TRL's DPOTrainer: same weights, pairs and precomputed reference.

Some responses hold tokens that are not scored.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.tokens.dataset import TokenDataset
from support import tiny
from support.runs import exported, steps_of

PAIRS = 6


def pairs_of(setup) -> list[dict]:
    """The first records with two responses each."""
    rows = [json.loads(line) for line in open(setup.records)][:PAIRS]
    return [{k: v for k, v in row.items() if k != "pivot_chosen"} for row in rows]


def trl_loss_and_gradients(setup, data, reference: LogprobStore, folder, beta: float):
    """TRL's loss of the first `PAIRS` pairs and its gradients, in float32."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokens = TokenDataset(data)
    examples = []
    unscored = []  # (row of TRL's batch, token)
    for i in range(PAIRS):
        chosen, rejected = (ids.tolist() for ids in tokens.response_ids(i)[:2])
        for r, mark in enumerate(tokens.record(i).scored or ()):
            places = (tokens.prompt_lengths[i] + np.flatnonzero(~mark)).tolist()
            unscored += [(i + r * PAIRS, place) for place in places]
        sums = reference.sums(i)
        examples.append(
            {
                "prompt_ids": tokens.prompt_ids(i).tolist(),
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "ref_chosen_logps": float(sums[0]),
                "ref_rejected_logps": float(sums[1]),
            }
        )
    model = AutoModelForCausalLM.from_pretrained(setup.hf, dtype=torch.float32)
    rows = pairs_of(setup)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(folder / "trl"), beta=beta, use_cpu=True, report_to=[], bf16=False,
            precompute_ref_log_probs=True, per_device_train_batch_size=PAIRS, max_length=None,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(
            [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]
        ),
        processing_class=AutoTokenizer.from_pretrained(setup.hf),
    )  # fmt: skip
    batch = trainer.data_collator(examples)
    assert len(unscored) > PAIRS
    for place in unscored:
        assert batch["completion_mask"][place] == 1
        batch["completion_mask"][place] = 0
    loss = trainer.compute_loss(model.train(), batch)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", [[], ["--tensor-model-parallel-size", "2"]], ids=["tp1", "tp2"])
def test_dpo_matches_trl(setup, ranks, tmp_path, layout):
    """One step of plain SGD at learning rate 1 moves every parameter by its gradient."""
    # A reference other than the policy, or loss and gradients would hide mistakes in it.
    other = tiny.save_model(tmp_path / "other", "llama", seed=9)
    few = setup.folder / f"few{len(layout)}.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in pairs_of(setup)))
    tiny.add_turns(few)
    flags = ["--input", str(few), "--output", str(tmp_path / "reference")]
    ranks(
        1,
        "support.scoring:score",
        ["--backend", "transformers", "--model", str(other), *flags],
    )
    data = tmp_path / "few"
    ranks(
        1, "support.tools:run_tool", "prepare_preferences",
        ["--input", str(few), "--tokenizer", str(setup.hf), "--output", str(data)],
    )  # fmt: skip
    sources = tmp_path / "sources.yaml"
    sources.write_text("initial: reference\nsources: []\n")
    argv = [
        "--method", "dpo", "--reference-check", "off", "--train-iters", "1",
        "--optimizer", "sgd", "--sgd-momentum", "0",
        "--lr", "1", "--weight-decay", "0", "--clip-grad", "0",
        "--preference-data", str(data), "--preference-sources", str(sources),
        "--pretrained-checkpoint", str(setup.pivot), "--global-batch-size", str(PAIRS),
        "--micro-batch-size", "2", "--lr-decay-style", "constant", "--seq-length", "256",
        "--save", str(tmp_path / "run"), "--save-interval", "1", *layout,
    ]  # fmt: skip
    results = ranks(max(1, len(layout)), "support.training:train", argv)
    expected_loss, gradients = trl_loss_and_gradients(
        setup, data, LogprobStore(str(tmp_path / "reference")), tmp_path, beta=0.1
    )
    assert steps_of(results)[0]["loss"] == pytest.approx(expected_loss, abs=1e-4)
    before = load_file(setup.hf / "model.safetensors")
    after = exported(ranks, tmp_path / "run", tmp_path / "hf")
    assert set(gradients) == set(before)
    for name, gradient in gradients.items():
        difference = (before[name] - after[name]) - gradient
        assert difference.norm() / gradient.norm() < 1e-3, name
