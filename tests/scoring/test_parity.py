"""Per-token log-probs of Megatron and transformers on the same packed rows, in float32."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_infifpo.convert.block_fp8 import open_scored
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import megatron_args
from megatron_infifpo.scoring.transformers_backend import TransformersBackend
from support import tiny
from support.launcher import RankError

TOLERANCE = 1e-4
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def make_row(ids: list[list[int]]) -> dict[str, Any]:
    """Pack sequences into a row that scores every token but the first of each."""
    lengths = torch.tensor([len(x) for x in ids])
    ends = lengths.cumsum(0)
    starts = ends - lengths
    tokens = torch.tensor([t for x in ids for t in x])
    scored = torch.cat([torch.arange(a, b - 1) for a, b in zip(starts, ends, strict=True)])
    return {
        "tokens": tokens[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": torch.cat([torch.zeros(1), ends]).int(),
        "max_seqlen": int(lengths.max()),
        "segment_lengths": lengths.tolist(),
        "scored_rows": scored,
        "target_ids": tokens[scored + 1],
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    # 307 is prime: every TP pads the vocabulary.
    return {
        name: tiny.save_model(folder / name, name, vocab_size=307, seed=i)
        for i, name in enumerate(tiny.FAMILIES)
    }


def compare(ranks, hf: Path, rows: list[dict], tp: int, pp: int, folder: Path) -> float:
    """Largest difference of a token's log-prob."""
    torch.save(rows, folder / "rows.pt")
    # In this process, which is free of the CPU stand-ins.
    expected = TransformersBackend.load(hf)(rows)
    results = ranks(
        tp * pp, "support.scoring:megatron_logprobs", str(hf), str(folder / "rows.pt"), tp, pp
    )
    writers = [result for result in results if result is not None]
    assert len(writers) == 1, "exactly one rank of a model replica writes"
    differences = [(a - b).abs().max() for a, b in zip(writers[0], expected, strict=True)]
    return float(torch.stack(differences).max())


@pytest.mark.parametrize("tp, pp", LAYOUTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tiny_models(models, ranks, tmp_path, family, tp, pp):
    generator = torch.Generator().manual_seed(5)
    rows = [
        make_row([torch.randint(0, 307, (n,), generator=generator).tolist() for n in lengths])
        for lengths in ([31, 17, 52], [100], [9, 3, 64, 4])  # multiples of TP as the loader pads
    ]
    assert compare(ranks, models[family], rows, tp, pp, tmp_path) <= TOLERANCE


EXPERTS = {
    "tp2-ep2": {"tensor_parallel": 2, "expert_parallel": 2},
    "tp2-etp2": {"tensor_parallel": 2, "expert_tensor_parallel": 2},
    "cp2-ep2": {"context_parallel": 2, "expert_parallel": 2},
    "cp2-tp2-ep4": {"context_parallel": 2, "tensor_parallel": 2, "expert_parallel": 4},
}


@pytest.mark.parametrize("layout", EXPERTS)
def test_experts(models, ranks, layout):
    """Spread over the ranks of a row, however these share it."""
    generator = torch.Generator().manual_seed(6)
    texts = [torch.randint(0, 307, (n,), generator=generator).tolist() for n in (31, 100, 9)]
    hf, sizes = models["qwen3_moe"], EXPERTS[layout]
    world = sizes.get("tensor_parallel", 1) * sizes.get("context_parallel", 1)
    results = ranks(world, "support.scoring:megatron_logprobs_at", str(hf), texts, sizes)
    (found,) = [result for result in results if result is not None]
    expected = TransformersBackend.load(hf)([make_row([text]) for text in texts])
    for got, wanted in zip(found, expected, strict=True):
        assert float((got - wanted).abs().max()) <= TOLERANCE


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"expert_parallel": 2}, "1 ranks compute a row together"),
        ({"expert_parallel": 3, "tensor_parallel": 2}, "expected one of 1, 2, 4, 8"),
    ],
)
def test_experts_that_ranks_of_other_rows_would_share(models, ranks, sizes, sentence):
    with pytest.raises(RankError) as failure:
        hf = str(models["qwen3_moe"])
        ranks(2, "support.scoring:megatron_logprobs_at", hf, [[1, 2]], sizes)
    assert sentence in "".join(failure.value.logs)


def real_row(model: Path, shared_data: Path) -> dict:
    """Eight real texts of 61 to 200 tokens."""
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (shared_data / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    ids = [tokenizer(json.loads(line)["text"])["input_ids"][:200] for line in lines]
    ids[-1] = ids[-1][: len(ids[-1]) - sum(map(len, ids)) % 3]  # a multiple of every TP
    return make_row(ids)


@pytest.mark.parametrize("tp, pp", [(1, 1), (3, 1), (1, 2)])
def test_smollm2(smollm2, ranks, shared_data, tmp_path, tp, pp):
    rows = [real_row(smollm2, shared_data)]
    assert compare(ranks, smollm2, rows, tp, pp, tmp_path) <= TOLERANCE


@pytest.mark.parametrize("tp, pp", [(1, 1), (1, 2)])
def test_gemma(gemma, ranks, shared_data, tmp_path, tp, pp):
    rows = [real_row(gemma, shared_data)]
    assert compare(ranks, gemma, rows, tp, pp, tmp_path) <= TOLERANCE


def in_fp8(hf: Path, folder: Path, block: int) -> Path:
    """The same model with projections in FP8 and a scale for each block, as Qwen publishes it."""
    shutil.copytree(hf, folder)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in tiny.load_weights(hf).items():
        stored[name] = weight
        if "proj" not in name or name.endswith("bias"):
            continue
        rows, columns = (-(-size // block) for size in weight.shape)
        scale = torch.empty(rows, columns)
        stored[name] = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for row, column in itertools.product(range(rows), range(columns)):
            part = tuple(slice(i * block, (i + 1) * block) for i in (row, column))
            scale[row, column] = weight[part].abs().max() / 448
            stored[name][part] = (weight[part] / scale[row, column]).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    how = {"quant_method": "fp8", "weight_block_size": [block, block]}
    config = json.loads((hf / "config.json").read_text())
    config["quantization_config"] = {**how, "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_source_in_fp8(ranks, models, tmp_path):
    """Both backends compute with the numbers that weights and scales stand for."""
    generator = torch.Generator().manual_seed(9)
    rows = [make_row([torch.randint(307, (n,), generator=generator).tolist() for n in (40, 9)])]
    hf = in_fp8(models["qwen2"], tmp_path / "fp8", 32)
    assert compare(ranks, hf, rows, 2, 1, tmp_path) < TOLERANCE
    exact = TransformersBackend.load(models["qwen2"])(rows)
    assert float((TransformersBackend.load(hf)(rows)[0] - exact[0]).abs().max()) > 100 * TOLERANCE
    with pytest.raises(UserError, match=r"quantized weights are not supported .*score it with"):
        megatron_args(json.loads((hf / "config.json").read_text()))


def test_fp8_without_its_scales(models, tmp_path):
    hf = in_fp8(models["qwen2"], tmp_path / "fp8", 32)
    weights = tiny.load_weights(hf)
    name = "model.layers.1.mlp.up_proj.weight"
    cases: dict[str, dict[str, Any]] = {
        f"{name} has no scale": {f"{name}_scale_inv": None},
        r"_scale_inv has shape \[3, 1\], expected \[3, 2\]": {
            f"{name}_scale_inv": torch.ones(3, 1)
        },
        "norm.weight has a scale, but is not in FP8": {
            "model.norm.weight_scale_inv": torch.ones(2)
        },
    }
    for match, change in cases.items():
        found = {k: v for k, v in (weights | change).items() if v is not None}
        save_file(found, hf / "model.safetensors")
        with pytest.raises(UserError, match=match):
            open_scored(hf)
