"""Scoring: backends and layouts agree, packing changes nothing, what does not fit is masked."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_infifpo.references.logprob_store import LogprobStore
from support import tiny
from support.launcher import refused

LAYOUTS = {  # name -> ranks, flags
    "dp2": (2, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "cp2-tp2": (4, ["--context-parallel-size", "2", "--tensor-model-parallel-size", "2"]),
    "tp2-pp2": (
        4,
        ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"],
    ),
}


# One of each kind of layers; tests/scoring/test_parity.py has every family at its layouts.
FAMILIES = (
    "llama-tied", "qwen2-window", "phi3-partial", "gemma3", "olmo3", "glm4", "gpt_oss",
    "qwen2_moe",
)  # fmt: skip


def flags(records: Path, backend: str, model: Path, output: Path, *more: str) -> list[str]:
    inputs = ["--input", str(records), "--output", str(output)]
    return ["--backend", backend, "--model", str(model), *inputs, *more]


def worst(a: Path, b: Path) -> float:
    """Largest difference of a token's log-prob."""
    left, right = LogprobStore(a), LogprobStore(b)
    assert len(left) == len(right) and (left.token_counts == right.token_counts).all()
    assert left.manifest["records_sha256"] == right.manifest["records_sha256"]
    return max(
        float(np.abs(left.logprobs(i, r) - right.logprobs(i, r)).max())
        for i in range(len(left))
        for r in range(len(left.responses))
        if not left.masked(i)
    )


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A model of each of these.

    Initialised so that rounding is not amplified: at tiny's usual 0.2, transformers itself is 2e-5
    from float64.
    """
    folder = tmp_path_factory.mktemp("families")
    return {
        name: tiny.save_model(folder / name, name, vocab_size=307, seed=i, initializer_range=0.1)
        for i, name in enumerate(FAMILIES)
    }


@pytest.fixture(scope="module")
def scored(families, ranks, tmp_path_factory):
    """All of them scored by one rank with Megatron; some tokens of responses are not scored."""
    folder = tmp_path_factory.mktemp("scored")
    records = tiny.add_turns(tiny.write_records(folder / "r.jsonl", 12))

    def run(name: str, world: int, backend: str, *more: str) -> Path:
        output = folder / name
        more = ("--shard-records", "5", "--micro-batch-tokens", "300", *more)
        jobs = [flags(records, backend, m, output / f, *more) for f, m in families.items()]
        ranks(world, "support.scoring:score_jobs", jobs)
        return output

    run("one", 1, "megatron")
    return run


@pytest.fixture(scope="module")
def one(scored, families, tmp_path_factory):
    return next(tmp_path_factory.getbasetemp().glob("scored*")) / "one"


def test_backends_agree(scored, one, families):
    hf = scored("hf", 1, "transformers")
    for name in families:
        assert worst(one / name, hf / name) <= 1e-4, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(scored, one, families, layout):
    world, more = LAYOUTS[layout]
    found = scored(layout, world, "megatron", *more)
    for name in families:
        difference = worst(one / name, found / name)
        assert difference <= 1e-5, name
        if layout == "dp2":
            for suffix in (".bin", ".idx", "_sums.npy", "_counts.npy"):
                a, b = (Path(f"{folder / name}{suffix}").read_bytes() for folder in (one, found))
                assert a == b, (name, suffix)


def test_one_record_a_row_equals_packed_rows(scored, one, families):
    alone = scored("alone", 1, "megatron", "--micro-batch-tokens", "1")
    for name in families:
        assert worst(one / name, alone / name) <= 1e-5, name


@pytest.mark.parametrize("backend", ["megatron", "transformers"])
def test_one_response_a_row_equals_whole_records(scored, one, families, backend):
    """Some records have fewer tokens than that, and stay whole."""
    alone = scored(f"{backend}-split", 1, backend, "--max-row-tokens", "100")
    for name in families:
        assert LogprobStore(alone / name).manifest["max_row_tokens"] == 100
        assert worst(one / name, alone / name) <= (1e-5 if backend == "megatron" else 1e-4), name


@pytest.mark.parametrize(
    ("world", "more", "said"),
    [
        (1, ["--max-row-tokens", "100"], "its max_row_tokens is 100, this one's is None"),
        (2, ["--context-parallel-size", "2"], "its context_parallel is 2, this one's is None"),
    ],
)
def test_finished_at_another_layout(setup, ranks, tmp_path, world, more, said):
    """The numbers may differ by rounding, so it is another job."""
    argv = flags(setup.records, "megatron", setup.hf, tmp_path / "o")
    ranks(world, "support.scoring:score", [*argv, *more])
    assert said in refused(ranks, "tools/score_source.py", argv)


def test_transformers_data_parallel(scored, one, families):
    """One rank a model: the same bytes on two ranks as on one."""
    alone, both = scored("hf-one", 1, "transformers"), scored("hf-dp2", 2, "transformers")
    for name in families:
        for suffix in (".bin", ".idx", "_sums.npy", "_counts.npy"):
            a, b = (Path(f"{folder / name}{suffix}").read_bytes() for folder in (alone, both))
            assert a == b, (name, suffix)


def test_transformers_tensor_parallel(setup, ranks, tmp_path):
    model = setup.folder / "qwen"
    tp2 = ["--tensor-model-parallel-size", "2"]
    argv = flags(setup.records, "transformers", model, tmp_path / "tp2", *tp2)
    ranks(2, "support.scoring:score", argv)
    ranks(
        1,
        "support.scoring:score",
        flags(setup.records, "transformers", model, tmp_path / "one"),
    )
    assert worst(tmp_path / "tp2", tmp_path / "one") <= 1e-4


def test_gemma_that_also_reads_images(ranks, tmp_path):
    """Gemma-3-12B comes with a vision tower: both backends score its language model."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    text = tiny.save_model(tmp_path / "text", "gemma3", vocab_size=290)
    inner = Gemma3TextConfig.from_pretrained(text).to_dict()
    eye = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    eye |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=inner, vision_config=eye, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).float().save_pretrained(tmp_path / "hf")
    tiny.save_tokenizer(tmp_path / "hf", 290)
    records = tiny.write_records(tmp_path / "r.jsonl", 4)
    for backend in ("megatron", "transformers"):
        argv = flags(records, backend, tmp_path / "hf", tmp_path / backend)
        ranks(1, "support.scoring:score", argv)
    assert worst(tmp_path / "megatron", tmp_path / "transformers") <= 1e-4


@pytest.mark.parametrize("layout", [[], ["--pipeline-model-parallel-size", "2"]])
def test_real_model(smollm2, ranks, shared_data, tmp_path, layout):
    """SmolLM2 on real pairs, against transformers."""
    pairs = json.loads((shared_data / "dpo_en_demo.json").read_text(encoding="utf-8"))
    short = sorted(pairs, key=lambda p: len(json.dumps(p)))[:4]
    records = tmp_path / "real.json"
    records.write_text(json.dumps(short))
    ranks(
        2 if layout else 1,
        "support.scoring:score",
        flags(records, "megatron", smollm2, tmp_path / "megatron", *layout),
    )
    ranks(1, "support.scoring:score", flags(records, "transformers", smollm2, tmp_path / "hf"))
    assert worst(tmp_path / "megatron", tmp_path / "hf") <= 1e-4


def test_bfloat16_is_near_float32(setup, ranks, tmp_path):
    model = setup.folder / "qwen"
    for backend in ("megatron", "transformers"):
        ranks(
            1,
            "support.scoring:score",
            flags(setup.records, backend, model, tmp_path / backend, "--bf16"),
        )
        half, whole = LogprobStore(tmp_path / backend), LogprobStore(setup.folder / "qwen")
        assert half.manifest["dtype"] == "bfloat16"
        means = [store.all_sums / store.token_counts for store in (half, whole)]
        np.testing.assert_allclose(means[0], means[1], atol=0.1)


def test_what_was_scored_is_in_the_manifest(setup):
    manifest = LogprobStore(setup.folder / "qwen").manifest
    assert manifest["tokenizer"]["end_of_turn"] == "<|end|>"
    first = json.loads(setup.records.read_text().splitlines()[0])
    assert manifest["example"] == {
        "id": first["id"],
        "prompt": f"<|user|>{first['prompt']}<|end|><|assistant|>",
        "chosen": f"{first['chosen']}<|end|>",
    }
    assert manifest["device"] and manifest["context_length"] == 512


def test_texts_beyond_the_context_are_masked(setup, ranks, tmp_path):
    model = tiny.save_model(tmp_path / "m", "llama", max_position_embeddings=100)
    output = tmp_path / "short"
    more = ["--shard-records", "5"]
    ranks(1, "support.scoring:score", flags(setup.records, "megatron", model, output, *more))
    store = LogprobStore(output)
    assert store.masked_records.any() and not store.masked_records.all()
    index = int(store.masked_records.argmax())
    assert store.note(index) == "longer than the context of 100 tokens"


def test_prompts_that_the_template_refuses_are_masked(setup, ranks, tmp_path):
    """And not even looked at where their domain is not scored."""
    model = tiny.save_model(tmp_path / "strict", "llama", seed=6)
    strict = "{% if 'moon' in messages[0].content %}{{ raise_exception('no moon') }}{% endif %}"
    (model / "chat_template.jinja").write_text(strict + tiny.TEMPLATE)
    lines = [json.loads(line) for line in setup.records.read_text().splitlines()]
    refused = ["moon" in line["prompt"] for line in lines]
    assert any(refused) and not all(refused)
    ranks(1, "support.scoring:score", flags(setup.records, "megatron", model, tmp_path / "all"))
    store = LogprobStore(tmp_path / "all")
    assert store.masked_records.tolist() == refused
    assert store.note(refused.index(True)) == "the chat template refuses it: no moon"
    more = ["--domains", "code"]
    ranks(
        1,
        "support.scoring:score",
        flags(setup.records, "megatron", model, tmp_path / "code", *more),
    )
    notes = [LogprobStore(tmp_path / "code").note(i) for i in range(len(lines))]
    assert all(
        note == "outside the domains code"
        for note, line in zip(notes, lines, strict=True)
        if line["domain"] != "code"
    )


def test_texts_beyond_the_context_are_cut_on_request(setup, ranks, tmp_path):
    model, whole = setup.hf, LogprobStore(setup.folder / "initial")
    more = ["--context-length", "100", "--over-context", "cut"]
    ranks(
        1,
        "support.scoring:score",
        flags(setup.records, "megatron", model, tmp_path / "cut", *more),
    )
    store = LogprobStore(tmp_path / "cut")
    assert store.manifest["over_context"] == "cut"
    shortened = (store.token_counts < whole.token_counts).any(axis=1) & ~store.masked_records
    assert shortened.any() and not shortened.all()
    for i in range(len(store)):
        if store.masked(i):
            continue
        expected = "responses cut to the context of 100 tokens" if shortened[i] else None
        assert store.note(i) == expected
        for r in range(3):
            cut = store.logprobs(i, r)
            np.testing.assert_allclose(cut, whole.logprobs(i, r)[: len(cut)], atol=1e-4)


def test_only_some_domains(setup, ranks, tmp_path):
    model, whole = setup.folder / "qwen", LogprobStore(setup.folder / "qwen")
    more = ["--domains", "code", "--shard-records", "2"]  # some shards have none
    ranks(
        2,
        "support.scoring:score",
        flags(setup.records, "megatron", model, tmp_path / "code", *more),
    )
    store = LogprobStore(tmp_path / "code")
    domains = [json.loads(line)["domain"] for line in setup.records.read_text().splitlines()]
    assert store.masked_records.tolist() == [domain != "code" for domain in domains]
    assert store.note(1) == "outside the domains code"
    np.testing.assert_allclose(store.sums(0), whole.sums(0), atol=1e-3)


def test_inspect_shows_what_was_scored(setup, ranks):
    """Every model's prompt and tokens, each with the log-prob that is stored."""
    sources = setup.sources("inspected", "{name: qwen, logprobs: qwen}")
    argv = ["--data", str(setup.data), "--sources", str(sources), "--id", "train-3", "--tokens"]
    ranks(1, "support.tools:run_tool", "inspect_preferences", argv)
    shown = ranks.logs[0]
    assert "qwen, megatron, float32; tokenizer" in shown and "a turn ends with '<|end|>'" in shown
    record = json.loads(setup.records.read_text().splitlines()[3])
    assert shown.count(f"<|user|>{record['prompt']}<|end|><|assistant|>") == 3
    lines = shown.split("qwen: what it")[1].splitlines()
    line = next(line for line in lines if line.startswith("rejected, tokens"))
    tokens = re.findall(r"'(.*?)' (-?\d+\.\d{3})", line)
    assert "".join(text for text, _ in tokens) == record["rejected"] + "<|end|>"
    expected = LogprobStore(setup.folder / "qwen").logprobs(3, 1)
    np.testing.assert_allclose([float(v) for _, v in tokens], expected, atol=6e-4)
