"""Scoring by transformers from the command line: whole models, and numbers of a text alone."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Phi3ForCausalLM

from megatron_infifpo.records.records import read_records
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support import tiny
from support.launcher import RankError


def score(ranks, world, model, records, output, *more):
    argv = ["--backend", "transformers", "--model", str(model), "--input", str(records)]
    ranks(world, "support.scoring:score", [*argv, "--output", str(output), *more])


def test_texts_on_two_sides_of_a_switch(ranks, tmp_path):
    """Sums equal those of a plain loop, in shards of one record and of all."""
    folder = tiny.save_model(tmp_path / "long", "phi3", num_attention_heads=4)
    config = json.loads((folder / "config.json").read_text())
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2, 3, 4, 6, 8, 12.0]}
    long = {"rope_type": "longrope", "original_max_position_embeddings": 64, "rope_theta": 1e4}
    config |= {"rope_parameters": long | factors, "original_max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    records = tiny.write_records(tmp_path / "r.jsonl", 8)
    model, chat = Phi3ForCausalLM.from_pretrained(folder), ChatTokenizer.from_pretrained(folder)
    expected, lengths = [], []
    for tokens in chat.encode_batch(read_records([records])):
        prompt = len(tokens.prompt_ids)
        for response in tokens.response_ids:
            ids = torch.tensor(np.concatenate([tokens.prompt_ids, response])).long()
            with torch.no_grad():
                logprobs = model(ids[None]).logits[0].log_softmax(-1)
            expected.append(logprobs[:-1].gather(1, ids[1:, None])[prompt - 1 :].sum().item())
            lengths.append(len(ids))
    assert min(lengths) < 60 and max(lengths) > 68
    for size in ("1", "256"):
        score(ranks, 1, folder, records, tmp_path / size, "--shard-records", size)
        found = LogprobStore(tmp_path / size).all_sums.flatten()
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_missing_tensor_on_sharded_ranks(ranks, tmp_path):
    folder = tiny.save_model(tmp_path / "m", "llama")
    records = tiny.write_records(tmp_path / "r.jsonl", 2)
    weights = tiny.load_weights(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.equal(
        weights.pop("lm_head.weight")
    )
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(RankError) as failure:
        score(ranks, 2, folder, records, tmp_path / "o", "--tensor-model-parallel-size", "2")
    # The first rank to tell ends the others.
    assert "tensor lm_head.weight is missing" in "".join(failure.value.logs)
    assert not list(tmp_path.glob("o*"))


def test_no_second_think_block(ranks, shared_data, tmp_path, monkeypatch):
    """Sums known from a plain loop; behind one more, empty think block, -111.851 and -126.415."""
    cases = shared_data.parent / "cases"
    if not (cases / "make_models.py").is_file():
        pytest.skip(f"no {cases / 'make_models.py'}, whose models the numbers are of")
    monkeypatch.setattr(sys, "argv", ["make_models.py", str(tmp_path)])
    runpy.run_path(str(cases / "make_models.py"))
    score(ranks, 1, tmp_path / "qwen3", cases / "data" / "one_think.jsonl", tmp_path / "out")
    found = LogprobStore(tmp_path / "out").sums(0)
    assert found == pytest.approx([-110.021, -115.763], abs=1e-3)
