"""infifpo report of runs on lists, and of rounds: numbers by plain loops, and what a page has."""

import html
import json
import re
from typing import Any

import numpy as np
import pytest

from megatron_infifpo.checks.data import DataJob, check_data
from megatron_infifpo.checks.inspection import InspectionJob, inspect_record
from megatron_infifpo.commands.main import run_command
from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import resolve
from megatron_infifpo.report.collect import agreement, method_of, read_curves, read_pairs, shares
from megatron_infifpo.report.judge import ranked_as_judged
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.training.provenance import FORMAT, read_run
from support.list_job import MASKED, WEIGHTS, ListJob, line

METRICS = (
    "loss", "residual/std", "reward", "length", "no-end-of-turn", "kl/initial", "kl/a", "kl/b",
    "share/a", "domain/math/loss", "domain/math/reward",
)  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return ListJob(tmp_path_factory.mktemp("lists"))


def read(job, method: str, **options):
    trained = str(job.folder / "trained")
    return read_pairs(str(job.data), str(job.sources), resolve(method, **options), 512, trained)


@pytest.fixture(scope="module")
def pairs(job):
    """As fuserlhf sees them: without the records that have one score."""
    return read(job, "fuserlhf", beta=0.25)


def scored(number: int) -> list[int]:
    """Which responses of a record have a score."""
    return [i for i, score in enumerate(line(number)["scores"]) if score is not None]


def test_what_is_read_of_lists(job, pairs):
    expected = [i for i in range(24) if len(scored(i)) > 1]
    assert pairs.indices.tolist() == expected and 15 < len(expected) < 24
    assert pairs.models == ("initial pivot", "a", "b", "trained pivot") and pairs.lists
    stores = [pairs.dataset.references.initial.store]
    stores += [source.store for source in pairs.dataset.references.sources]
    for at, number in enumerate(expected):
        there = scored(number)
        assert pairs.valid[at].tolist() == [r < len(there) for r in range(5)]
        assert np.isnan(pairs.means[at, len(there) :]).all()
        assert np.isnan(pairs.reference[at, len(there) :]).all()
        rewards = [line(number)["scores"][i] for i in there]
        assert pairs.scores[at, : len(there)].tolist() == rewards
        sums = [store.sums(number)[there] for store in stores]
        known = [True, True, number != MASKED and line(number)["domain"] != "law"]
        for model, (total, store) in enumerate(zip(sums, stores, strict=True)):
            mean = total / store.counts(number)[there] if known[model] else np.nan
            np.testing.assert_allclose(pairs.means[at, : len(there), model], mean + 0 * total)
        weights = np.array([WEIGHTS["initial"], WEIGHTS["a"], WEIGHTS["b"]]) * known
        weights /= weights.sum()
        fused = sum(w * s for w, s in zip(weights, sums, strict=True))
        np.testing.assert_allclose(pairs.reference[at, : len(there)], fused)
        residuals = np.array(rewards) - 0.25 * (sums[0] - fused)
        assert pairs.losses[at] == pytest.approx(np.var(residuals, ddof=1) / 0.5)
        # Shares are of the sources, and then of the initial pivot.
        group = np.arange(len(expected)) == at
        (found,) = shares(pairs, pairs.selected, [group])
        np.testing.assert_allclose(found, np.roll(weights, -1), rtol=1e-6)


def test_who_ranks_as_the_judge(pairs):
    """Every two responses of every record, one after the other."""
    names, alike, known = ranked_as_judged(pairs)
    assert names == (*pairs.models, "fused reference")
    values = [pairs.means[..., m] for m in range(4)] + [pairs.reference]
    for at, scores in enumerate(pairs.scores):
        for model, column in enumerate(values):
            right = total = 0
            for i in range(5):
                for j in range(i):
                    judged, own = scores[i] - scores[j], column[at, i] - column[at, j]
                    if judged and not np.isnan(judged) and not np.isnan(own):
                        total += 1
                        right += judged * own > 0
            assert (alike[at, model], known[at, model]) == (right, total)
    assert known.sum(axis=0).min() > 20 and 0 < alike.sum() < known.sum()


def test_agreement_of_models_on_lists(pairs):
    found = agreement(pairs)
    for a in range(4):
        for b in range(4):
            same = []
            for own, other in zip(pairs.means[..., a], pairs.means[..., b], strict=True):
                for i in range(5):
                    for j in range(i):
                        gaps = own[i] - own[j], other[i] - other[j]
                        if np.isfinite(gaps).all():
                            same.append((gaps[0] > 0) == (gaps[1] > 0))
            assert found[a, b] == pytest.approx(np.mean(same))


def test_pairs_of_lists_are_the_best_and_the_worst(job):
    pairs = read(job, "infifpo")
    assert not pairs.lists and pairs.roles == ("best", "worst")
    assert pairs.means.shape[1:] == (2, 4)
    for at, number in enumerate(pairs.indices.tolist()):
        scores = [line(number)["scores"][i] for i in scored(number)]
        assert pairs.scores[at].tolist() == [max(scores), min(scores)]
    initial = pairs.means[..., 0]
    np.testing.assert_array_equal(pairs.margins(0), initial[:, 0] - initial[:, 1])


def test_lists_without_any_score(tmp_path):
    """PAD needs none: all responses are there, in one panel, and nothing is said of a judge."""
    from megatron_infifpo.report.plots import _kinds

    job = ListJob(tmp_path, count=8)
    manifest = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(manifest | {"scores_sha256": None}))
    pairs = read(job, "pad")
    assert pairs.scores is None and len(pairs.indices) == 8
    assert pairs.valid.sum(axis=1).tolist() == [len(line(i)["responses"]) for i in range(8)]
    assert [*_kinds(pairs)] == ["all responses"]


def write_run(job, method: str, tags=METRICS) -> None:
    """A run's folder as training leaves it: what it is made of, and its curves."""
    from torch.utils.tensorboard import SummaryWriter

    store = {"weights_sha256": "w" * 64, "logprobs_sha256": "l" * 64, "dtype": "float32"}
    data = {"records_sha256": "r" * 64, "initial": store, "sources": {"a": store, "b": store}}
    files = {"preference_data": str(job.data), "preference_sources": str(job.sources)}
    attempt: dict[str, Any] = {
        "started": "now",
        "iteration": "0",
        "files": files,
        "command": ["train"],
    }
    attempt |= {"command": ["train"], "versions": {}, "layout": {"world_size": 1}}
    attempt |= {"device": "x", "git_revision": None}
    described = resolve(method).describe()
    identity = {"method": described, "seed": 1, "seq_length": 512, "data": data}
    run = FORMAT.fields | {"identity": identity, "attempts": [attempt]}
    (job.folder / "run.json").write_text(json.dumps(run | {"started_from": {"checkpoint": "x"}}))
    with SummaryWriter(str(job.folder / "tensorboard")) as writer:
        for step in (1, 2, 3):
            for place, tag in enumerate(tags):
                writer.add_scalar(tag, place + step / 8, step)


def text(page: str) -> str:
    words = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return html.unescape(re.sub(r"<[^>]+>", " ", words))


def test_page_of_lists(job, pairs):
    write_run(job, "fuserlhf")
    trained = ["--trained", str(job.folder / "trained")]
    run_command("report", [str(job.folder), *trained, "--shown", "2"])
    page = (job.folder / "report.html").read_text()
    images = set(re.findall(r'<img alt="([^"]+)"', page))
    assert {"loss, residuals and rewards over steps", "agreement between models"} <= images
    assert {"KL, length and responses without an end over steps", "by domain over steps"} <= images
    assert {"selected sources at step 0", "selected sources after training"} <= images
    assert not any("margin" in name or "rewards and log-probs" in name for name in images)
    words = text(page)
    for absent in ("chosen", "rejected", "margin", " nan", "http"):
        assert absent not in words, absent
    assert re.search(r"residual/std\s+1.1250 at step 1, 1.3750 at step 3", words)
    assert re.search(r"kl/b\s+7.1250 at step 1, 7.3750 at step 3", words)
    # What the judge says, and who ranks as it does.
    there = [scored(i) for i in pairs.indices.tolist()]
    rewards = [line(i)["scores"][r] for i in pairs.indices.tolist() for r in scored(i)]
    assert f"{len(rewards)}, 2 to {max(map(len, there))} a record" in words
    assert re.search(rf"mean score\s+{np.mean(rewards):.4f}", words)
    names, alike, known = ranked_as_judged(pairs)
    for name, right, total in zip(names, alike.sum(axis=0), known.sum(axis=0), strict=True):
        assert re.search(rf"{name}\s+{right / total:.3f} of {total} ", words), name
    law = np.array([line(i)["domain"] == "law" for i in pairs.indices.tolist()])
    assert known[law, 2].sum() == 0 and "-" in words, "source b knows no law"
    # The hardest list, with its texts.
    worst = int(pairs.indices[read(job, "fuserlhf").losses.argmax()])
    assert words.index(f"q{worst} (") == min(
        words.index(f"q{i} (") for i in range(24) if f"q{i} (" in words
    )
    first, reward = scored(worst)[0], line(worst)["scores"][scored(worst)[0]]
    assert f"response_{first}, score {reward:g}" in words
    assert words.count("mean log-prob changed by") == 2


def test_page_of_pairs_of_lists(job):
    write_run(job, "infifpo", tags=("loss", "rewards/chosen", "rewards/rejected"))
    run_command("report", [str(job.folder)])
    words = text((job.folder / "report.html").read_text())
    assert "prefers the best response" in words and "The hardest pairs" in words
    assert "What the judge says" not in words
    assert TokenDataset(job.data).listed and re.search(r"response_\d, score \d", words)


def write_rounds(folder, rewards) -> None:
    counts = {"prompts": 8, "responses": 32, "records": 7}
    seconds = {"sample": 2.0, "train": 3.0, "export": None}
    rows = [
        {
            "round": number, **counts, "cut": 4 - number, "reward": reward, "seconds": seconds,
            "training": {"first": {"loss": 0.5, "kl/initial": number / 8, "length": 20}},
        }
        for number, reward in enumerate(rewards)
    ]  # fmt: skip
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_page_of_rounds(tmp_path):
    write_rounds(tmp_path, [0.25, None, 0.75])
    run_command("report", [str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    rows = [
        re.findall(r"<t[dh]>([^<]*)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)
    ]
    assert rows[0] == "round prompts records cut reward loss KL tokens seconds".split()
    assert rows[1] == "0 8 7 12.5% 0.2500 0.5000 0.0000 20.0000 5".split()
    assert rows[2] == "1 8 7 9.4% - 0.5000 0.1250 20.0000 5".split()
    assert rows[3][3:7] == "6.2% 0.7500 0.5000 0.2500".split()
    assert '<img alt="what changed over rounds"' in page


def test_what_no_page_of_rounds_has(tmp_path):
    write_rounds(tmp_path, [0.25])
    with pytest.raises(UserError, match="--trained has no effect: .* is of rounds"):
        run_command("report", [str(tmp_path), "--trained", "x"])
    path = tmp_path / "rounds.jsonl"
    for broken, said in (
        ("", "is empty: no round is done yet"),
        ("{", "rounds.jsonl:1 is broken JSON"),
        ('{"round": 1}', "rounds.jsonl:1 has no 'prompts'"),
        ("[]", r"rounds.jsonl:1 is '\[\]', expected an object"),
        (path.read_text().replace("0.25", "NaN"), "reward is nan, expected a number"),
        (path.read_text().replace("20", "null"), "length is None, expected a number"),
    ):
        path.write_text(broken)
        with pytest.raises(UserError, match=said):
            run_command("report", [str(tmp_path)])


def test_a_real_run(setup, ranks, tmp_path):
    """What training logs of lists, what its page shows, and what inspection says, are the same."""
    folder = tmp_path / "run"
    flags = ["--save", str(folder), "--tensorboard-dir", str(folder / "tensorboard")]
    argv = setup.method_flags("fuserlhf", *flags, "--tensorboard-log-interval", "1")
    ranks(1, "support.training:train", argv)
    run_command("report", [str(folder)])
    page = (folder / "report.html").read_text()
    assert "KL, length and responses without an end over steps" in page
    assert "What the judge says of the responses" in page and "chosen" not in text(page)
    found = read_run(folder)
    assert found is not None
    files = found["attempts"][-1]["files"]
    data, sources = files["preference_data"], files["preference_sources"]
    pairs = read_pairs(data, sources, method_of(found), found["identity"]["seq_length"], None)
    curves = read_curves(folder / "tensorboard")
    logged = {tag: values[0] for tag, (_, values, _) in curves.items()}
    # The first step sees eight of the lists at step 0.
    assert pairs.losses.min() <= logged["loss"] <= pairs.losses.max()
    assert logged["kl/initial"] == pytest.approx(0, abs=1e-3)
    assert logged["share/qwen"] + logged["share/phi"] + logged["share/initial"] == pytest.approx(1)
    for index, loss in zip(pairs.indices[:4].tolist(), pairs.losses[:4].tolist(), strict=True):
        job = InspectionJob(data, pairs.dataset.tokens.ids(index), sources, method=method_of(found))
        assert float([*inspect_record(job)][-1].removeprefix("loss ")) == pytest.approx(
            loss, abs=1e-4
        )
    checks = list(check_data(DataJob(data, sources, run=str(folder))))
    assert all(check.error is None for check in checks), checks
    assert checks[-1].note == "1 attempts on these data"
