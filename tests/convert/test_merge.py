"""Merging folders: what is written, what is refused, and another program's result."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_infifpo.commands.main import run_words
from megatron_infifpo.convert import merging
from megatron_infifpo.convert.fingerprint import weights_fingerprint
from megatron_infifpo.convert.hf_export import export_checkpoint
from megatron_infifpo.convert.hf_import import import_checkpoint
from megatron_infifpo.convert.merge import MERGE_FILE, merge
from megatron_infifpo.convert.merge_job import MergeJob
from megatron_infifpo.errors import UserError
from support import mergekit_numbers, tiny
from support.launcher import ROOT
from support.tiny import assert_same_weights, load_weights

NAME = "model.layers.2.mlp.up_proj.weight"


def make_models(folder: Path, family: str = "qwen2", count: int = 3) -> list[Path]:
    """A base, and models of other weights."""
    return [tiny.save_model(folder / f"m{i}", family, seed=i) for i in range(count + 1)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[Path]:
    """A base and three models, to be read alone."""
    return make_models(tmp_path_factory.mktemp("merge"))


@pytest.fixture
def models(tmp_path, made) -> list[Path]:
    """Copies that a test may spoil: a base and two models."""
    return [Path(shutil.copytree(path, tmp_path / path.name)) for path in made[:3]]


def job(models: list[Path], output: Path, method: str = "sce", **options) -> MergeJob:
    base, *others = map(str, models)
    return MergeJob(method=method, base=base, models=others, output=str(output), **options)


def edit_weights(folder: Path, dtype: torch.dtype | None = None, **changes: torch.Tensor) -> None:
    weights = {**load_weights(folder), **changes}
    save_file({k: v.to(dtype) if dtype else v for k, v in weights.items()},
              folder / "model.safetensors")  # fmt: skip


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


GIVEN: dict[str, dict[str, Any]] = {
    "sce": {"select_top": 0.2, "select": "weights"},
    "varm": {},
    "linear": {"weights": [0.2, 0.5, 0.7]},
    "task-arithmetic": {"weights": [0.2, -0.5, 0.7], "scale": 0.8},
}


@pytest.mark.parametrize("method", GIVEN)
def test_files_hold_what_is_computed_in_memory(tmp_path, made, method):
    """In many files of one folder, or in one."""
    given = GIVEN[method]
    merge(job(made, tmp_path / "many", method, shard_bytes=50_000, **given))
    merge(job(made, tmp_path / "one", method, **given))
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 5
    assert_same_weights(tmp_path / "many", tmp_path / "one")
    base, *models = map(load_weights, made)
    for name, tensor in load_weights(tmp_path / "one").items():
        known = {"base": base[name], "targets": [model[name] for model in models], **given}
        takes = merging.parameters(method)
        values = {key: value for key, value in known.items() if key in takes}
        assert torch.equal(tensor, merging.MERGES[method](**values)), name


@pytest.mark.parametrize("family", ["llama-tied", "phi3", "gemma3"])
def test_a_merged_folder_is_a_model(tmp_path, family):
    """transformers loads it, Megatron's checkpoint of it exports to it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = make_models(tmp_path, family, 2)
    out = tmp_path / "out"
    merge(job(made, out, select_top=0.5, shard_bytes=50_000))
    model, loaded = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    state = model.state_dict()
    for name, tensor in load_weights(out).items():
        assert torch.equal(state[name], tensor), name
    vocabulary = AutoTokenizer.from_pretrained(made[0]).get_vocab()
    assert AutoTokenizer.from_pretrained(out).get_vocab() == vocabulary
    import_checkpoint(out, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert weights_fingerprint(tmp_path / "back") == weights_fingerprint(out)


def test_one_model_is_copied(tmp_path, models):
    base, model, _ = models
    for method in ("sce", "varm", "linear"):
        merge(job([base, model], tmp_path / method, method))
        assert_same_weights(tmp_path / method, model)


def test_the_order_of_models_changes_no_bit(tmp_path, made):
    base, a, b, c = made
    merge(job([base, a, b, c], tmp_path / "x"))
    merge(job([base, c, a, b], tmp_path / "y"))
    assert_same_weights(tmp_path / "x", tmp_path / "y")
    for number, (order, weights) in enumerate((((a, b, c), [1, 2, 3]), ((c, a, b), [3, 1, 2]))):
        merge(job([base, *order], tmp_path / f"w{number}", "linear", weights=weights))
    assert_same_weights(tmp_path / "w0", tmp_path / "w1")


def test_what_is_written(tmp_path, models):
    """The base's files, but weights; and what was merged."""
    base, a, b = models
    edit_json(base / "generation_config.json", temperature=0.3)
    edit_json(base / "config.json", auto_map={"AutoConfig": "x.Y"}, my_note="kept")
    (base / "LICENSE").write_text("terms")
    (base / "code.py").write_text("")
    words = ["merge", "--method", "linear", "--base", base, "--models", b, a, "--weights", "3", "1"]
    words += ["--output", tmp_path / "new" / "out", "--dtype", "bf16"]
    run_words(list(map(str, words)))
    out = tmp_path / "new" / "out"
    read = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"):
        assert read[name] == (base / name).read_bytes()
    assert "code.py" not in read
    config = json.loads(read["config.json"])
    assert (config["my_note"], config["dtype"]) == ("kept", "bfloat16")
    assert "auto_map" not in config
    assert {tensor.dtype for tensor in load_weights(out).values()} == {torch.bfloat16}
    found = json.loads(read[MERGE_FILE])
    folders = [(path, weight) for path, weight in ((a, 1.0), (b, 3.0))]
    assert found["models"] == [
        {"folder": str(path), "weights_sha256": weights_fingerprint(path), "weight": weight}
        for path, weight in folders
    ]
    assert found["base"] == {"folder": str(base), "weights_sha256": weights_fingerprint(base)}
    assert (found["method"], found["options"], found["dtype"]) == ("linear", {}, "bfloat16")


def test_the_dtype_of_weights_is_kept(tmp_path, models):
    for path in models:
        edit_weights(path, torch.bfloat16)
    merge(job(models, tmp_path / "out"))
    base, *others = map(load_weights, models)
    for name, tensor in load_weights(tmp_path / "out").items():
        wide = merging.sce(base[name].float(), [other[name].float() for other in others])
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, wide.bfloat16()), name


def refused(match: str, models: list[Path], method: str = "sce", **options) -> None:
    output = models[0].parent / "not-to-be"
    with pytest.raises(UserError, match=match):
        merge(job(models, output, method, **options))
    assert not list(output.parent.glob("*not-to-be*")), "nothing may be left"


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("slerp", {}, "--method is 'slerp', expected one of sce, varm, linear, task-arithmetic"),
        ("varm", {"select_top": 0.1}, "--select-top has no effect with --method varm: it belongs"),
        ("linear", {"select": "deltas"}, "--select has no effect .* belongs to sce"),
        ("sce", {"scale": 1.0}, "--scale has no effect .* belongs to task-arithmetic"),
        ("sce", {"weights": [1, 1]}, "--weights has no effect with --method sce, which finds"),
        ("sce", {"select_top": 0.0}, r"--select-top is 0.0, expected a number in \(0, 1\]"),
        ("sce", {"select_top": float("nan")}, "--select-top is nan"),
        ("sce", {"select": "both"}, "--select is 'both', expected one of deltas, weights"),
        ("task-arithmetic", {"scale": float("inf")}, "--scale is inf"),
        ("linear", {"weights": [1]}, "--weights has 1 numbers for 2 models"),
        ("linear", {"weights": [1, float("nan")]}, "--weights has nan, expected finite"),
        ("linear", {"weights": [0, 0]}, r"--weights is \[0, 0\], .* not all 0"),
        ("linear", {"weights": [2, -1]}, "of at least 0"),
        ("sce", {"dtype": torch.int8}, "--dtype is torch.int8, expected one of float32"),
    ],
)
def test_settings(models, method, options, match):
    refused(match, models, method, **options)


def test_folders(tmp_path, models):
    base, a, b = models
    with pytest.raises(UserError, match="--models is empty, expected folders"):
        job([base], tmp_path / "out")
    refused("--models .*m1 is given twice", [base, a, a])
    refused("--models .*m0 is given twice", [base, a, base])
    for inside in (a, a / "x" / "y", base / "out"):
        with pytest.raises(UserError, match=r"--output .* is in --(models|base) .*m\d: expected"):
            job(models, inside)
    with pytest.raises(UserError, match="--output .*exists and is not empty"):
        job([base, a], b)
    (tmp_path / "empty").mkdir()
    merge(job(models, tmp_path / "empty"))
    refused("has neither config.json nor", [base, tmp_path / "nothing"])


def test_the_same_weights_twice(models):
    base, a, b = models
    (base / "LICENSE").write_text("another file changes nothing")
    shutil.copy(base / "model.safetensors", b / "model.safetensors")
    refused("--models .*m2 has the weights of --base .*m0", models)
    shutil.copy(a / "model.safetensors", b / "model.safetensors")
    refused("--models .*m2 has the weights of --models .*m1", models)


def test_other_models(tmp_path, models):
    base, a, b = models
    refused(r"tensor \S+ is (not there|of shape)", [base, tiny.save_model(tmp_path / "l", "llama")])
    wide = tiny.save_model(tmp_path / "w", "qwen2", seed=9, intermediate_size=128)
    refused(r"tensor \S+ is of shape \[64, 128\], but of shape \[64, 96\] in --base", [base, wide])
    more = tiny.save_model(tmp_path / "v", "qwen2", seed=9, vocab_size=310)
    refused(r"of shape \[310, 64\], but of shape \[320, 64\]", [base, more])
    weights = load_weights(a)
    del weights[NAME]
    save_file(weights, a / "model.safetensors")
    refused(f"{a}: tensor {NAME} is missing", models)


def test_another_computation(models):
    edit_json(models[1] / "config.json", rms_norm_eps=0.5)
    refused("m1: its config.json gives layernorm_epsilon 0.5, that of --base .*m0", models)


def test_other_vocabularies(models, capsys):
    base, a, b = models
    merge(job(models, base.parent / "fine"))
    assert "chat template" not in capsys.readouterr().out
    (a / "chat_template.jinja").write_text("another")
    merge(job(models, base.parent / "noted"))
    assert f"{a}: its chat template is not that of {base}" in capsys.readouterr().out
    for path in a.glob("tokenizer*"):
        path.unlink()
    merge(job(models, base.parent / "without"))
    content = json.loads((b / "tokenizer.json").read_text())
    x, y = list(content["model"]["vocab"].items())[-2:]
    content["model"]["vocab"] |= {x[0]: y[1], y[0]: x[1]}
    (b / "tokenizer.json").write_text(json.dumps(content))
    refused("m2 has another vocabulary than --base .*m0: token .* has the id", models)


def test_dtypes_that_differ(models):
    edit_weights(models[2], torch.bfloat16)
    refused("mixed dtypes .*m0: .*float32 and .*m2: .*bfloat16.*: say with --dtype", models)
    merge(job(models, models[0].parent / "out", dtype=torch.float32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers(models, value, which, dtype):
    for number, path in enumerate(models):
        tensor = load_weights(path)[NAME]
        if number == which:
            tensor[5, 7] = value
        edit_weights(path, dtype, **{NAME: tensor})
    refused(rf"m{which}: tensor {NAME} has elements that are infinite or NaN", models)


def test_numbers_beyond_the_dtype(models):
    refused("beyond torch.float16", models, "task-arithmetic", scale=1e6, dtype=torch.float16)


@pytest.mark.parametrize("limit", [10_000, 400_000])
def test_full_disk_leaves_nothing(models, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        refused("cannot write --output .*nothing was left", models)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


KILL = """
import os, signal, sys
from unittest import mock
import megatron_infifpo.convert.merge as program
from megatron_infifpo.commands.main import run_words
calls = []
def load(part, name, load=program._load):
    calls.append(name)
    if len(calls) == 60:
        os.kill(os.getpid(), signal.SIGKILL)
    return load(part, name)
with mock.patch.object(program, "_load", load):
    run_words(sys.argv[1:])
"""


def test_killed_midway(tmp_path, models):
    """Nothing has the name; what was written aside does not hinder the next try."""
    base, a, b = models
    words = ["merge", "--method", "sce", "--base", base, "--models", a, b, "--output"]
    words = [*map(str, words), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", KILL, *words], capture_output=True, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "m0", "m1", "m2"]
    assert {p.name for p in (tmp_path / ".out.partial").iterdir()} == {"model.safetensors"}
    run_words(words)
    assert not (tmp_path / ".out.partial").exists() and (tmp_path / "out").is_dir()


def test_ranks_share_the_files(tmp_path, made, ranks):
    base, *others = map(str, made)
    ranks(2, "support.conversion:merge", "sce", base, others, str(tmp_path / "two"), 50_000)
    merge(job(made, tmp_path / "one"))
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def test_a_folder_has_the_numbers_of_mergekit(tmp_path):
    """By the command, in one tensor of four small models; the next test is of all tensors."""
    name, sizes = "model.layers.1.self_attn.k_proj.bias", {"hidden_size": 20}
    sizes |= {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    folders = []
    for seed, tensor in enumerate(mergekit_numbers.models(torch.float32)):
        folders.append(tiny.save_model(tmp_path / f"m{seed}", "qwen2", seed=seed, **sizes))
        edit_weights(folders[-1], **{name: tensor})
    for number, case in enumerate(mergekit_numbers.CASES.values()):
        words = ["merge", "--method", case.method, "--base", folders[0], "--models", *folders[1:]]
        for key, value in case.options.items():
            flag = f"--{key.replace('_', '-')}"
            words += [flag, *(value if isinstance(value, list) else [value])]
        run_words([str(word) for word in [*words, "--output", tmp_path / f"out{number}"]])
        assert load_weights(tmp_path / f"out{number}")[name].tolist() == case.float32, case.method


MERGEKIT: dict[str, tuple[dict[str, Any], list[dict[str, float]]]] = {
    "sce": ({"parameters": {"select_topk": 0.1}}, [{}] * 3),
    "linear": ({}, [{"weight": w} for w in GIVEN["linear"]["weights"]]),
    "task-arithmetic": (
        {"parameters": {"normalize": False, "lambda": 0.8}},
        [{"weight": w} for w in GIVEN["task-arithmetic"]["weights"]],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", MERGEKIT)
def test_equals_mergekit_bit_by_bit(tmp_path, made, method, dtype):
    program = os.environ.get("INFIFPO_MERGEKIT") or shutil.which("mergekit-yaml")
    if program is None:
        pytest.skip("no mergekit-yaml: pip install mergekit, or name it with INFIFPO_MERGEKIT")
    folders = [Path(shutil.copytree(path, tmp_path / path.name)) for path in made]
    for path in folders:
        edit_weights(path, dtype)
    more, parameters = MERGEKIT[method]
    entries = zip(folders[1:], parameters, strict=True)
    recipe = {
        "merge_method": method.replace("-", "_"),
        "dtype": "float32",
        "models": [{"model": str(path), "parameters": given} for path, given in entries],
        **more,
    }
    if method != "linear":
        recipe["base_model"] = str(folders[0])
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))  # JSON is YAML
    subprocess.run(
        [program, str(tmp_path / "recipe.yml"), str(tmp_path / "theirs"), "--quiet"], check=True
    )
    given = {} if method == "sce" else GIVEN[method]
    merge(job(folders, tmp_path / "ours", method, dtype=torch.float32, **given))
    assert_same_weights(tmp_path / "ours", tmp_path / "theirs")
