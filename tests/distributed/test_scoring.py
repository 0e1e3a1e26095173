"""Scoring: the two backends agree, shards do not depend on ranks, interrupted jobs resume."""

from pathlib import Path

import numpy as np
import pytest
import tiny

from megatron_infifpo.data.logprob_store import LogprobStore


def flags(setup, backend: str, model: Path, output: Path, *more: str) -> list[str]:
    inputs = ["--input", str(setup.records), "--output", str(output)]
    return ["--backend", backend, "--model", str(model), *inputs, *more]


def assert_equal(a: Path, b: Path, tolerance: float) -> None:
    left, right = LogprobStore(a), LogprobStore(b)
    assert len(left) == len(right) and (left.token_counts == right.token_counts).all()
    for i in range(len(left)):
        for r in range(2):
            difference = np.abs(left.logprobs(i, r) - right.logprobs(i, r)).max()
            assert difference <= tolerance, (i, r)


@pytest.mark.parametrize(
    "world, layout",
    [
        (2, ["--tensor-model-parallel-size", "2"]),
        (2, ["--pipeline-model-parallel-size", "2"]),
        (2, []),
    ],
    ids=["tp2", "pp2", "dp2"],
)
def test_backends_agree(setup, ranks, tmp_path, world, layout):
    model = setup.folder / "qwen"
    more = [*layout, "--shard-records", "6"]
    argv = flags(setup, "megatron", model, tmp_path / "megatron", *more)
    ranks(world, "workers:score", argv)
    ranks(1, "workers:score", flags(setup, "transformers", model, tmp_path / "hf"))
    assert_equal(tmp_path / "megatron", tmp_path / "hf", 1e-4)


def test_transformers_tensor_parallel(setup, ranks, tmp_path):
    model = setup.folder / "qwen"
    argv = flags(
        setup, "transformers", model, tmp_path / "tp2", "--tensor-model-parallel-size", "2"
    )
    ranks(2, "workers:score", argv)
    ranks(1, "workers:score", flags(setup, "transformers", model, tmp_path / "one"))
    assert_equal(tmp_path / "tp2", tmp_path / "one", 1e-4)


def test_real_model(smollm2, setup, ranks, shared_data, tmp_path):
    """SmolLM2 at TP 1 on real pairs."""
    import json

    pairs = json.loads((shared_data / "dpo_en_demo.json").read_text(encoding="utf-8"))
    short = sorted(pairs, key=lambda p: len(json.dumps(p)))[:4]
    records = tmp_path / "real.json"
    records.write_text(json.dumps(short))
    for backend in ("megatron", "transformers"):
        argv = ["--backend", backend, "--model", str(smollm2), "--input", str(records)]
        ranks(1, "workers:score", [*argv, "--output", str(tmp_path / backend)])
    assert_equal(tmp_path / "megatron", tmp_path / "transformers", 1e-4)


def test_bytes_do_not_depend_on_ranks_or_interruptions(setup, ranks, tmp_path):
    more = ["--shard-records", "4", "--row-tokens", "300"]
    model = setup.folder / "qwen"
    ranks(1, "workers:score", flags(setup, "megatron", model, tmp_path / "one", *more))
    argv = flags(setup, "megatron", model, tmp_path / "two", *more)
    ranks(2, "workers:score_and_die", argv, 1)
    assert not (tmp_path / "two.json").exists()
    assert len(list((tmp_path / "two.shards").glob("[0-9]*.npz"))) in (1, 2)
    ranks(2, "workers:score", argv)
    for suffix in (".bin", ".idx"):
        one, two = (Path(f"{tmp_path / name}{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two
    assert not (tmp_path / "two.shards").exists()


def test_texts_beyond_the_context_are_masked(setup, ranks, tmp_path):
    """A model with a context of 100 tokens, then one that holds no record at all."""
    for context, masked in ((100, False), (8, True)):
        model = tiny.save_model(tmp_path / f"m{context}", "llama", max_position_embeddings=context)
        output = tmp_path / f"short{context}"
        ranks(1, "workers:score", flags(setup, "megatron", model, output, "--shard-records", "5"))
        store = LogprobStore(output)
        assert store.masked_records.all() == masked and store.masked_records.any()
        index = int(store.masked_records.argmax())
        assert "context of" in store.note(index)
