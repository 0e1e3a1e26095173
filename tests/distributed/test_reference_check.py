"""The pivot must give the initial pivot's log-probs, and a run must stay the run that it is."""

import json
import re
import shutil

import numpy as np
import pytest

from megatron_infifpo.storage.documents import Documents
from megatron_infifpo.tokens.dataset import scores_fingerprint
from support.launcher import refused
from support.runs import BOTH, LAYOUTS

PROGRAM = "megatron_infifpo.train"


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


@pytest.mark.parametrize("method, layout", [("fuserlhf", "tp2-pp2"), ("infifpo", "dp2")])
def test_lists_agree(setup, ranks, tmp_path, method, layout):
    """All responses of a list, or its best and its worst; a run that goes on says how far it is."""
    world, flags = LAYOUTS[layout]
    job = setup.lists
    sources = job.sources("both", *BOTH)
    argv = job.flags(sources, "--method", method, *flags, "--save", str(tmp_path / "run"))
    ranks(world, "support.training:train", [*argv, "--stop-at", "1"])
    line = next(x for x in ranks.logs[0].splitlines() if x.startswith("reference check:"))
    assert "records the pivot agrees" in line
    assert float(line.split("within ")[1].split()[0]) < 1e-4
    ranks(world, "support.training:train", [*argv, "--stop-at", "2"])
    assert re.search(r"moved by [-+.\d]+ nats a token of all responses since", ranks.logs[0])


def test_a_lists_worst_response_is_named(setup, ranks, tmp_path):
    """Other values of one response of one record, the last one of a longest list."""
    job = setup.lists
    for path in job.folder.glob("[iq][nw]*[._]*"):  # of initial and of qwen
        shutil.copy(path, tmp_path / path.name)
    sources = "initial: initial\nsources: [{name: qwen, logprobs: qwen}]\n"
    (tmp_path / "sources.yaml").write_text(sources)
    counts = np.load(tmp_path / "initial_counts.npy")
    record = int((counts > 0).all(axis=1).argmax())
    last = counts.shape[1] - 1
    values = np.fromfile(tmp_path / "initial.bin", np.float32)
    sums = np.load(tmp_path / "initial_sums.npy")
    sums[record, last] -= counts[record, last]
    end = int(counts[: record + 1].sum())
    values[end - counts[record, last] : end] -= 1.0
    values.tofile(tmp_path / "initial.bin")
    np.save(tmp_path / "initial_sums.npy", sums)
    argv = job.flags(tmp_path / "sources.yaml", "--method", "fuserlhf")
    said = refused(ranks, "megatron_infifpo.train", argv)
    assert "on 1 of 20 records, by up to 1 nats" in said, said
    assert f"record 'train-{record}', response_{last}, 1 nats a token" in ranks.logs[0]


def test_scores_and_weights_are_of_a_runs_identity(setup, ranks, tmp_path):
    """A run does not go on with other rewards, or other weights of its sources."""
    job, data = setup.lists, tmp_path / "data"
    weighted = "initial: {{logprobs: initial, weight: 0.3}}\nsources:\n" \
        "  - {{name: qwen, logprobs: qwen, weight: {}}}\n"  # fmt: skip
    for name, weight in (("sources", 0.7), ("other", 0.6)):
        (job.folder / f"{name}.yaml").write_text(weighted.format(weight))
    argv = job.flags(job.folder / "sources.yaml", "--save", str(tmp_path / "run"))
    argv += ["--method", "fuserlhf", "--next-round"]
    ranks(1, "support.training:train", [*argv, "--stop-at", "1"])
    found = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert found["source_weights"] == {"qwen": 0.7, "initial": 0.3}
    at = argv.index("--preference-sources") + 1
    other = [*argv[:at], str(job.folder / "other.yaml"), *argv[at + 1 :]]
    assert "source_weights.qwen is 0.6, but was 0.7" in refused(ranks, PROGRAM, other)
    for path in job.folder.glob("train*"):
        shutil.copy(path, tmp_path / path.name.replace("train", "data"))
    scores = np.load(f"{data}_scores.npy") + 1
    np.save(f"{data}_scores.npy", scores)
    manifest = json.loads((tmp_path / "data.json").read_text())
    manifest["scores_sha256"] = scores_fingerprint(scores)
    (tmp_path / "data.json").write_text(json.dumps(manifest))
    argv[argv.index("--preference-data") + 1] = str(data)
    argv.remove("--next-round")
    assert "data.scores_sha256 is " in refused(ranks, PROGRAM, argv)
