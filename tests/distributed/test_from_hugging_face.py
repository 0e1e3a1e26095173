"""A run from a Hugging Face folder is the run from what import makes of it, to the bit."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.training.folders import Folders
from megatron_infifpo.training.start import find_start
from support import tiny
from support.launcher import refused
from support.runs import BOTH, LAYOUTS, steps_of

TRAIN = "support.training:train"


@pytest.fixture
def flags(setup):
    """Command line of three steps from a pivot, or from none."""

    def make(pivot: Path | None, *more: str) -> list[str]:
        argv = setup.flags(setup.sources("both", *BOTH), *more)
        at = argv.index("--pretrained-checkpoint")
        argv[at : at + 2] = [] if pivot is None else [argv[at], str(pivot)]
        return argv

    return make


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file in a folder but its lock, by its path there."""
    files = (path for path in folder.rglob("[!.]*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "layout, more",
    [("tp2", []), ("tp2", ["--bf16"]), ("pp2", []), ("pp2-vpp2", ["--bf16"])],
    ids=["tp2", "tp2-bf16", "pp2", "pp2-vpp2-bf16"],
)
def test_as_from_the_import(setup, flags, ranks, tmp_path, layout, more):
    """Losses, norms of gradients, and what is exported; the folder's weights are in float32."""
    world, parallel = LAYOUTS[layout]
    runs = []
    for name, pivot in (("a", setup.pivot), ("b", setup.hf)):
        save = ["--save", str(tmp_path / name), "--export", str(tmp_path / f"{name}-hf")]
        results = ranks(world, TRAIN, flags(pivot, *parallel, *more, *save))
        runs.append((steps_of(results), results[0]["norms"]))
        assert "on 20 records the pivot agrees" in ranks.logs[0]
    assert len(runs[0][1]) == 3 and runs[0] == runs[1]
    assert "weights of the Hugging Face folder" in ranks.logs[0]
    exports = [contents(tmp_path / name) for name in ("a-hf", "b-hf")]
    for files in exports:
        files.pop("infifpo_run.json")  # with the time of day
    assert exports[0] == exports[1]
    weights = tiny.load_weights(setup.hf)["model.norm.weight"]
    assert not weights.equal(tiny.load_weights(tmp_path / "b-hf")["model.norm.weight"])


def test_tied_embeddings(pivots, flags, ranks, tmp_path):
    """The last stage has a copy of the first one's; and Gemma has layers of its own."""
    hf, pivot = pivots("gemma3")
    assert json.loads((hf / "config.json").read_text())["tie_word_embeddings"]
    world, parallel = LAYOUTS["pp2"]
    runs = []
    for start in (pivot, hf):
        argv = flags(start, *parallel, "--method", "sft", "--train-iters", "2")
        at = argv.index("--preference-sources")
        results = ranks(world, TRAIN, argv[:at] + argv[at + 2 :])
        runs.append((steps_of(results), results[0]["norms"]))
    assert len(runs[0][1]) == 2 and runs[0] == runs[1]


def test_stopped_and_given_again(setup, flags, ranks, tmp_path):
    """The run in --save goes on, whichever of both pivots is named; it is exported at its end."""
    run, export = tmp_path / "run", tmp_path / "out"
    argv = flags(setup.hf, "--save", str(run), "--export", str(export))
    whole = steps_of(ranks(1, TRAIN, flags(setup.pivot)))
    first = ranks(1, TRAIN, [*argv, "--stop-at", "2"])
    assert "is not written: the last checkpoint" in ranks.logs[0] and not export.exists()
    assert "is of step 2 of 3" in ranks.logs[0]
    assert contents(run / "hf") == contents(setup.pivot / "hf")
    started = json.loads((run / "run.json").read_text())["started_from"]
    assert started["checkpoint"] == str(setup.hf.resolve())

    other = tiny.save_model(tmp_path / "other", "llama", seed=77)
    assert "but the run started from" in refused(
        ranks, "megatron_infifpo.train", flags(other, "--save", str(run))
    )
    imported = flags(setup.pivot, "--save", str(run), "--export", str(export))
    second = ranks(1, TRAIN, imported)
    assert steps_of(first) + steps_of(second) == whole
    assert f"exported step 3 of {run} to {export}" in ranks.logs[0]
    ranks(1, "support.tools:run_command", "export", "--load", str(run), "--save", f"{export}-2")
    assert contents(export) == contents(Path(f"{export}-2"))

    before = contents(run)
    ranks(1, TRAIN, argv)
    assert "nothing left to do" in ranks.logs[0] and "is there already" in ranks.logs[0]
    shutil.rmtree(export)
    ranks(2, TRAIN, argv)
    assert contents(export) == contents(Path(f"{export}-2")) and contents(run) == before
    longer = [*argv, "--train-iters", "4"]
    assert f"--export {export} exists" in refused(ranks, "megatron_infifpo.train", longer)


def test_an_export_as_pivot(setup, flags, ranks, tmp_path):
    """What a run exports begins another one, which names the run that it comes from."""
    run, export, again = (str(tmp_path / name) for name in ("run", "out", "again"))
    ranks(1, TRAIN, flags(setup.hf, "--train-iters", "1", "--save", run, "--export", export))
    argv = flags(Path(export), "--train-iters", "1", "--save", again)
    sentence = refused(ranks, "megatron_infifpo.train", argv)
    assert "are of other weights" in sentence and not Path(again).exists()
    ranks(1, TRAIN, [*argv, "--reference-check", "off"])
    files = [Path(folder, "run.json").read_text() for folder in (run, again)]
    before, after = map(json.loads, files)
    assert after["started_from"]["run"] == before["identity"]


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGE = {
    "weights": (lambda hf: (hf / "model.safetensors").unlink(), "holds neither model.safetensors"),
    "layer": (lambda hf: change_config(hf, num_hidden_layers=5), "is missing: config.json asks"),
    "quantized": (
        lambda hf: change_config(hf, quantization_config={"quant_method": "fp8"}),
        "quantized weights are not supported",
    ),
    "adapter": (lambda hf: (hf / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "family": (lambda hf: change_config(hf, model_type="mamba"), "mamba"),
    "config": (lambda hf: (hf / "config.json").unlink(), "no checkpoint in .* with config.json"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_folder_that_import_would_refuse(setup, tmp_path, what):
    damage, expected = DAMAGE[what]
    folder = shutil.copytree(setup.hf, tmp_path / "hf")
    named = {"save": str(tmp_path / "run"), "load": None, "finetune": False}
    folders = Folders.read(named | {"pretrained_checkpoint": str(folder)})
    found = find_start(folders)
    assert (found.is_hf, found.resumed, found.step, found.samples) == (True, False, 0, 0)
    damage(folder)
    with pytest.raises(UserError, match=expected):
        find_start(folders)


def test_refused(setup, flags, ranks, tmp_path):
    """What --export cannot be, and folders that are two things."""
    other = tiny.save_model(tmp_path / "other", "llama", seed=77)
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    evaluated = ["--skip-train", "--preference-valid-data", str(setup.data)]
    evaluated += ["--preference-valid-sources", str(setup.sources("both", *BOTH))]
    for expected, argv in (
        ("are of other weights", flags(other)),
        ("--export has no effect without --save", flags(setup.hf, "--export", out)),
        ("with --skip-train", flags(setup.hf, "--export", out, "--save", run, *evaluated)),
        ("lie in each other", flags(setup.hf, "--export", f"{run}/hf", "--save", run)),
        ("exists and is not empty", flags(setup.hf, "--export", str(other), "--save", run)),
        ("is a file", flags(setup.hf, "--export", f"{setup.records}/x", "--save", run)),
        (f"--save {other} is a Hugging Face folder", flags(setup.hf, "--save", str(other))),
        ("are both", flags(setup.hf, "--save", str(setup.hf))),
        ("no pivot: give --pretrained-checkpoint DIR, a Hugging Face folder", flags(None)),
    ):
        assert expected in refused(ranks, "megatron_infifpo.train", argv)
    assert not Path(run).exists() and not Path(out).exists()
