"""Rounds on the policy's own samples: where a run stops, and with what data it goes on."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_infifpo.convert.fingerprint import read_weights
from megatron_infifpo.tokens.measured import MeasuredResponse, read_measured, write_measured
from support import tiny
from support.launcher import RankError, refused
from support.runs import BOTH, LAYOUTS, exported, losses

PROGRAM = "megatron_infifpo.train"
ASYNC = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]


@pytest.fixture(scope="module")
def train(setup, ranks):
    """Train in one folder, six steps in all; return the losses and the first rank's log."""
    sources = setup.sources("both", *BOTH)

    def run(folder, *more, data=None, given=sources, world=1, again=None):
        argv = setup.flags(given, "--save", str(folder), "--train-iters", "6", *more)
        if data is not None:
            argv[argv.index("--preference-data") + 1] = str(data)
        if again is None:
            results = ranks(world, "support.training:train", argv)
        else:  # the plan of the data begins again after so many steps
            results = ranks(world, "support.training:train_in_rounds", argv, again)
        return losses(results) if results[-1]["steps"] else [], ranks.logs[0]

    return run


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("iter_*"))


def written(folder):
    """When each file was, but for the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".run.lock")
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize("how", [[], ASYNC], ids=["sync", "async"])
def test_stops_at_a_step(train, tmp_path, how):
    """Saved there, by the schedule of the whole run; the same command again has nothing to do."""
    run, cosine = tmp_path / "run", ["--lr-decay-style", "cosine", *how]
    whole, _ = train(tmp_path / "whole", *cosine)
    first, log = train(run, *cosine, "--stop-at", "2")
    assert "this run ends at step 2" in log
    assert checkpoints(run) == ["iter_0000002"]
    before = written(run)
    again, log = train(run, *cosine, "--stop-at", "2")
    assert again == [] and "nothing left to do: " in log and "raise --stop-at" in log
    assert written(run) == before
    second, _ = train(run, *cosine, "--stop-at", "5")
    last, _ = train(run, *cosine, "--stop-at", "6")
    assert checkpoints(run) == ["iter_0000002", "iter_0000005", "iter_0000006"]
    assert [len(part) for part in (first, second, last)] == [2, 3, 1]
    assert first + second + last == whole


def test_refused_stops(setup, ranks, tmp_path):
    flags = setup.flags(setup.sources("both", *BOTH), "--save", str(tmp_path / "run"))
    said = refused(ranks, PROGRAM, [*flags, "--stop-at", "4"])
    assert "--stop-at is 4, but the run has 3 steps" in said
    said = refused(ranks, PROGRAM, [*flags, "--stop-at", "2", "--exit-interval", "2"])
    assert "give one of --stop-at" in said


@pytest.fixture(scope="module")
def sampled(setup, tmp_path_factory):
    """Write what a model of transformers gives random responses, as a sampler does."""
    folder = tmp_path_factory.mktemp("sampled")

    def write(hf, name, vocabulary=256, lengths=(3, 9, 17, 30, 64), temperature=1.0, weights=True):
        random, found = np.random.default_rng(5), []
        own = read_weights(hf) if weights else ()
        network = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
        for number, length in enumerate(lengths):
            prompt, response = (random.integers(0, vocabulary, n, np.int32) for n in (7, length))
            ids = torch.from_numpy(np.concatenate([prompt, response])).long()
            with torch.no_grad():
                logits = network(ids[None]).logits[0, 6:-1].double() / temperature
            values = logits.log_softmax(-1).gather(-1, ids[7:, None])[:, 0].numpy()
            found.append(MeasuredResponse(f"p-{number}", prompt, response, values, str(hf), *own))
        write_measured(folder / name, found)
        return str(folder / name)

    return write


@pytest.mark.parametrize("layout", ["tp2-pp2", "pp2-vpp2", "dp2"])
def test_the_policy_gives_the_samplers_log_probs(setup, sampled, train, ranks, tmp_path, layout):
    world, flags = LAYOUTS[layout]
    path = sampled(setup.hf, "own")
    more = [*flags, "--sampler-logprobs", path, "--stop-at", "1"]
    _, log = train(tmp_path / "run", *more, world=world)
    line = next(x for x in log.splitlines() if x.startswith("sampler check: on 5 responses"))
    assert "agrees" in line and float(line.split("within ")[1].split()[0]) < 1e-4
    assert f"sampler check: {path} is of the weights in {setup.pivot} (" in log
    _, log = train(tmp_path / "run", *more[:-1], "2", world=world)
    assert "sampler check: on 5 responses the policy has moved by " in log
    assert "is of the weights in" not in log


def test_stale_samples_are_refused(setup, sampled, train, ranks, tmp_path):
    """A fresh run from weights that have moved since; from them as they were sampled it starts."""
    train(tmp_path / "before", "--stop-at", "2")
    old, pivot = sampled(setup.hf, "old", weights=False), tmp_path / "before"
    exported(ranks, pivot, tmp_path / "hf")
    new = sampled(tmp_path / "hf", "new")
    save = ["--save", str(tmp_path / "after")]
    argv = setup.flags(setup.sources("both", *BOTH), "--reference-check", "off", *save)
    argv[argv.index("--pretrained-checkpoint") + 1] = str(pivot)
    world, flags = LAYOUTS["tp2-pp2"]
    with pytest.raises(RankError) as failure:
        argv_old = [*argv, *flags, "--sampler-logprobs", old]
        ranks(world, "support.tools:command", PROGRAM, argv_old)
    # Whichever rank is first to say so; the launcher ends the others.
    log = "\n".join(ranks.logs)
    assert 2 in failure.value.codes and "Traceback" not in log
    for part in (
        "is not the one that was sampled: 123 tokens of 5 responses", "likely: other weights",
        "token 0 (id ", "(stale or quantized ones differ)", f"export {pivot} and sample",
    ):  # fmt: skip
        assert part in log
    assert not (tmp_path / "after" / "run.json").exists()
    ranks(1, "support.training:train", [*argv, "--sampler-logprobs", new, "--train-iters", "1"])
    assert "sampler check: on 5 responses the policy agrees" in ranks.logs[0]
    assert f"sampler check: {new} is of the weights in {pivot} (" in ranks.logs[0]
    argv = [each.replace("after", "loose") for each in argv]
    argv += ["--sampler-logprobs", old, "--sampler-tolerance", "100", "--train-iters", "1"]
    ranks(1, "support.training:train", argv)
    assert "(tolerance 100.0)" in ranks.logs[0]
    assert f"sampler check: {old} does not name the weights" in ranks.logs[0]
    # Log-probs that agree hide no weights that do not.
    named = sampled(setup.hf, "named")
    said = refused(ranks, PROGRAM, [x.replace(old, named).replace("loose", "named") for x in argv])
    assert f"{named} is of other weights" in said and "the samples are stale" in said


def test_samples_that_are_not_the_models(setup, sampled, train, ranks, tmp_path):
    flags = setup.flags(setup.sources("both", *BOTH))
    hot = sampled(setup.hf, "hot", temperature=0.7)
    said = refused(ranks, PROGRAM, [*flags, "--sampler-logprobs", hot])
    assert "is not the one that was sampled" in said and "temperature 1" in ranks.logs[0]
    one = read_measured(hot)[0]
    write_measured(tmp_path / "big", [dataclasses.replace(one, prompt_ids=one.prompt_ids + 10**6)])
    said = refused(ranks, PROGRAM, [*flags, "--sampler-logprobs", str(tmp_path / "big")])
    assert "holds the token id 1000" in said and "has another vocabulary" in said
    long = sampled(setup.hf, "long", lengths=(250, 251))
    said = refused(ranks, PROGRAM, [*flags, "--sampler-logprobs", long])
    assert "every response is longer than --seq-length 256" in said
    mixed = sampled(setup.hf, "mixed", lengths=(20, 250))
    _, log = train(tmp_path / "run", "--sampler-logprobs", mixed, "--stop-at", "1")
    assert "1 of 2 responses are longer than --seq-length 256" in log
    assert "sampler check: on 1 responses the policy agrees" in log
    said = refused(ranks, PROGRAM, [*flags, "--sampler-tolerance", "1"])
    assert "--sampler-tolerance has no effect" in said


@pytest.fixture(scope="module")
def other(setup, ranks, tmp_path_factory):
    """Data of a next round: other records, under the same three models; and under others."""
    folder = tmp_path_factory.mktemp("other")
    records = folder / "records.jsonl"
    tiny.write_records(records, 12, seed=7)
    argv = ["--input", str(records), "--tokenizer", str(setup.hf), "--output", str(folder / "data")]
    ranks(1, "support.tools:run_tool", "prepare_preferences", argv)
    names = {"initial": setup.pivot, "qwen": setup.folder / "qwen", "phi": setup.folder / "phi"}
    for name, model in {**names, "moved": setup.folder / "phi"}.items():
        flags = ["--backend", "megatron", "--model", str(model), "--input", str(records)]
        ranks(1, "support.scoring:score", [*flags, "--output", str(folder / name)])
    for name, phi in (("sources", "phi"), ("moved", "qwen")):
        (folder / f"{name}.yaml").write_text(
            f"initial: initial\nsources:\n  - {{name: qwen, logprobs: qwen}}\n"
            f"  - {{name: phi, logprobs: {phi}, domains: [code]}}\n"
        )
    return folder


def test_next_round(train, setup, sampled, other, ranks, tmp_path):
    """Other data is refused, and a round with the flag; then the chain says what was when."""
    run, path = tmp_path / "run", sampled(setup.hf, "samples")
    new = {"data": other / "data", "given": other / "sources.yaml"}
    train(run, "--stop-at", "2", "--next-round", "--sampler-logprobs", path)
    with pytest.raises(RankError, match=r"data.records_sha256 is .* pass --next-round"):
        train(run, "--stop-at", "4", **new)
    with pytest.raises(RankError, match=r"same references, but data.sources.phi.weights_sha256 is"):
        train(run, "--stop-at", "4", "--next-round", **new | {"given": other / "moved.yaml"})
    with pytest.raises(RankError, match=r"begins a round at step 2, where the run ends"):
        train(run, "--stop-at", "2", "--next-round", **new)
    with pytest.raises(RankError, match="is of other weights .* the samples are stale"):
        train(run, "--stop-at", "4", "--next-round", "--sampler-logprobs", path, **new)
    steps, log = train(run, "--stop-at", "4", "--next-round", **new)
    assert len(steps) == 2 and "round 2 on these pairs began after step 2" in log
    # Within the round, with and without the flag; the check does not refuse a policy that moved.
    _, log = train(run, "--stop-at", "5", "--sampler-logprobs", path, **new)
    assert "sampler check: on 5 responses the policy has moved by" in log
    with pytest.raises(RankError, match=r"the data of round 1, and the run is in round 2 since st"):
        train(run, "--next-round")
    assert train(run, "--stop-at", "2", "--next-round")[0] == []
    found = json.loads((run / "run.json").read_text())
    assert [each["iteration"] for each in found["rounds"]] == [0, 2]
    assert found["identity"]["data"] == found["rounds"][1]["data"] != found["rounds"][0]["data"]
    assert found["rounds"][1]["files"]["preference_data"] == str(other / "data")
    assert [each["iteration"] for each in found["attempts"]] == ["0", "2", "4"]


def test_a_round_changes_nothing_but_the_data(train, other, tmp_path):
    """Rounds on the same data are the uninterrupted run whose plan of the data begins with each.

    Bit by bit, the optimizer's state included, and where a round is resumed.
    """
    new = {"data": other / "data", "given": other / "sources.yaml"}
    whole, _ = train(tmp_path / "whole", again=2, **new)
    run, batch = tmp_path / "run", "of 8 are 1.33 epochs"
    first, _ = train(run, "--stop-at", "2", "--next-round", **new)
    rename(run / "run.json", "records_sha256")  # as if the first round's had been others
    second, log = train(run, "--next-round", "--stop-at", "4", **new)
    assert "round 2 on these pairs began after step 2" in log and f"2 steps {batch}" in log
    rename(run / "run.json", "records_sha256")
    third, _ = train(run, "--next-round", "--stop-at", "5", **new)
    again, log = train(run, "--next-round", "--stop-at", "6", **new)
    assert f"2 steps {batch}, in micro-batches of 2; 1 steps are done" in log
    assert first + second + third + again == whole
    assert whole[2:] != train(tmp_path / "other", **new)[0][2:], "the plan would not matter"


def rename(path, name):
    content = json.loads(path.read_text())
    for data in (content["identity"]["data"], content["rounds"][-1]["data"]):
        data[name] = "0" * 64
    path.write_text(json.dumps(content))


def test_evaluates_where_it_stops(setup, ranks, tmp_path):
    """Held-out pairs are seen at the stop of each start, as at the end of a run."""
    sources = setup.sources("both", *BOTH)
    held_out = ["--preference-valid-data", str(setup.data), "--preference-valid-sources"]
    argv = setup.flags(sources, "--save", str(tmp_path / "run"), *held_out, str(sources))
    stopped = ranks(1, "support.training:train", [*argv, "--stop-at", "2"])[0]
    ended = ranks(1, "support.training:train", [*argv, "--stop-at", "3"])[0]
    assert [len(part["evaluations"]) for part in (stopped, ended)] == [1, 1]
    assert stopped["evaluations"] != ended["evaluations"]
