"""The pivot must give the initial pivot's log-probs, and a run must stay the run that it is."""

import json
import shutil

import numpy as np
import pytest

from megatron_infifpo.storage.documents import Documents
from support.launcher import refused
from support.runs import BOTH, LAYOUTS


@pytest.fixture
def copies(setup, tmp_path):
    """The initial pivot's log-probs, and the qwen source's, to be spoiled."""
    for name in ("initial", "qwen"):
        for path in setup.folder.glob(f"{name}[._]*"):
            if path.is_file():
                shutil.copy(path, tmp_path / path.name)
    sources = tmp_path / "sources.yaml"
    sources.write_text("initial: initial\nsources: [{name: qwen, logprobs: qwen}]\n")
    return tmp_path, sources


def spoil(folder, change) -> None:
    """Change every value of the initial log-probs by (position, length, value) -> value."""
    prefix = str(folder / "initial")
    documents = Documents(prefix, np.float32, 3)
    values, sums = [], []
    for i in range(len(documents)):
        for sequence in documents.sequences(i):
            sequence[:] = [change(t, len(sequence), x) for t, x in enumerate(sequence)]
            values.append(sequence)
            sums.append(sequence.sum(dtype=np.float64))
    del documents
    np.concatenate(values).astype(np.float32).tofile(f"{prefix}.bin")
    np.save(f"{prefix}_sums.npy", np.array(sums).reshape(-1, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_at_every_layout(setup, ranks, layout):
    world, flags = LAYOUTS[layout]
    argv = setup.flags(setup.sources("both", *BOTH), *flags, "--train-iters", "1")
    ranks(world, "support.training:train", argv)
    line = next(x for x in ranks.logs[0].splitlines() if x.startswith("reference check:"))
    assert "on 20 records the pivot agrees" in line
    assert float(line.split("within ")[1].split()[0]) < 1e-4


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda t, n, x: x - 0.5, "other weights"),
        (lambda t, n, x: x - 0.004, "precision"),
        (lambda t, n, x: x - 3.0 * (t == n - 1), "the end of the turn"),
        (lambda t, n, x: x - 2.0 * (t < 2), "the prompt"),
        (lambda t, n, x: x - 0.5 * (t > n // 2), "positions"),
    ],
)
def test_other_logprobs_are_refused(setup, copies, ranks, change, cause):
    folder, sources = copies
    spoil(folder, change)
    argv = setup.flags(sources, "--train-iters", "1")
    sentence = refused(ranks, "megatron_infifpo.train", argv)
    assert "at step 0 the pivot disagrees with the initial pivot's log-probs" in sentence
    assert "on 20 of 20 records" in sentence
    assert f"likely: {cause}" in ranks.logs[0]
    assert "token 0 (id " in ranks.logs[0]


def test_warning_and_tolerance(setup, copies, ranks):
    folder, sources = copies
    spoil(folder, lambda t, n, x: x - 0.5)
    argv = setup.flags(sources, "--train-iters", "1")
    ranks(2, "support.training:train", [*argv, "--reference-check", "warn"])
    assert "the pivot disagrees" in ranks.logs[0] and "disagrees" not in ranks.logs[1]
    ranks(
        1,
        "support.training:train",
        [*argv, "--reference-tolerance", "0.6", "--reference-probes", "5"],
    )
    assert "on 5 records the pivot agrees" in ranks.logs[0]


def test_impossible_values_are_refused(setup, copies, ranks):
    folder, sources = copies
    sums = np.load(folder / "qwen_sums.npy")
    for value in (np.nan, np.inf, 1.0):
        sums[7, 1] = value
        np.save(folder / "qwen_sums.npy", sums)
        sentence = refused(ranks, "megatron_infifpo.train", setup.flags(sources))
        assert f"record 'train-7' has the log-prob {value}" in sentence


@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_nan_names_the_records(setup, ranks, tmp_path, what):
    from support.launcher import RankError

    save = ["--save", str(tmp_path / "run"), "--save-interval", "1"]
    argv = setup.flags(setup.sources("both", *BOTH), *save)
    with pytest.raises(RankError) as caught:
        ranks(1, "support.broken:train_with_a_bad_step", argv, 2, what)
    sentence = caught.value.logs[0].split("error: ")[-1]
    assert "NaN or infinite at step 1" in sentence and "train-" in sentence, caught.value
    # 16 is Megatron's: resume, to see whether it happens again.
    assert caught.value.codes == [2 if what == "weight" else 16]
    if what == "gradient":  # it does: then it is for a person
        with pytest.raises(RankError, match="the step was repeated: .* lower --lr") as caught:
            ranks(1, "support.broken:train_with_a_bad_step", argv, 1, what)
        assert caught.value.codes == [2]


def test_resume_is_the_same_run(setup, copies, ranks, tmp_path):
    folder, sources = copies
    save = ["--save", str(tmp_path / "run"), "--save-interval", "1"]
    argv = setup.flags(sources, *save)
    ranks(1, "support.training:train", [*argv, "--exit-interval", "2"])
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["identity"]["method"]["objective"] == "dpo"
    assert run["started_from"]["checkpoint"] == str(setup.pivot.resolve())
    for flags, change in (
        (["--beta", "1.0"], "method.beta is 1.0, but was 2.5"),
        (["--method", "dpo"], "method.reference is 'initial', but was 'fused'"),
        (["--seed", "7"], "seed is 7, but was 1234"),
    ):
        assert change in refused(ranks, "megatron_infifpo.train", [*argv, *flags])
    sources.write_text("initial: initial\nsources: [{name: other, logprobs: qwen}]\n")
    sentence = refused(ranks, "megatron_infifpo.train", argv)
    assert "data.sources.other is there, but was missing" in sentence
    ranks(1, "support.training:train", [*argv, "--allow-changed-run"])
    assert "the pivot has moved by" in ranks.logs[0]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [attempt["iteration"] for attempt in run["attempts"]] == ["0", "2"]
    assert run["identity"]["data"]["sources"].keys() == {"other"}
