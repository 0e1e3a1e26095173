"""Lists of responses: infifpo check finds what is wrong, infifpo inspect shows what is so."""

import json
import math
import re
from typing import Any

import numpy as np
import pytest

from megatron_infifpo.checks.data import DataJob, check_data
from megatron_infifpo.checks.inspection import InspectionJob, inspect_record
from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import resolve
from megatron_infifpo.records.records import read_records
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.summary import print_summary
from megatron_infifpo.rows.choice import NO_CONTRAST, NO_SCORES
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.prepare import PreparationJob, prepare
from support.datasets import write_jsonl, write_scores
from support.list_job import MASKED, WEIGHTS, ListJob, line


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return ListJob(tmp_path_factory.mktemp("lists"))


@pytest.fixture
def own(tmp_path):
    """A job to be damaged."""
    return ListJob(tmp_path, count=6)


def checked(job) -> tuple[dict[str, str], dict[str, str]]:
    """Notes and errors of all checks, by what was looked at."""
    checks = list(check_data(DataJob(str(job.data), str(job.sources))))
    notes = {c.what: c.note for c in checks if c.error is None}
    return notes, {c.what: c.error for c in checks if c.error is not None}


def test_good_lists(job):
    notes, errors = checked(job)
    assert not errors
    lines = [line(i) for i in range(24)]
    counts = [len(x["responses"]) for x in lines]
    scored = sum(score is not None for x in lines for score in x["scores"])
    cut = sum(reason == "length" for x in lines for reason in x["finish_reasons"])
    total = sum(counts)
    assert 0 < cut < total and 0 < scored < total and {2, 3, 4, 5} == set(counts)
    assert notes[f"responses in {job.data}"] == (
        f"2 to 5 a record, median 3.5; {scored / total:.1%} of {total} with a score, "
        f"{cut / total:.1%} cut"
    )
    assert notes["b, log-probs"] == "24 records, 1 of them masked; all values add up"
    assert notes["b, tokens"].startswith("23 records have the tokens of ")
    assert notes[str(job.sources)].endswith("weights a 2, b 1, initial pivot 0.5")


def judge_again(own):
    lines = [json.loads(text) for text in own.records.read_text().splitlines()]
    lines[3]["scores"][1] = 9.0
    write_jsonl(own.records, *lines)


def forget_a_score(own):
    lines = [json.loads(text) for text in own.records.read_text().splitlines()]
    lines[3]["scores"][1] = None
    write_jsonl(own.records, *lines)


def drop_scores(own):
    """As a data set is that was prepared before its records were judged."""
    manifest = json.loads((own.folder / "data.json").read_text())
    (own.folder / "data.json").write_text(json.dumps(manifest | {"scores_sha256": None}))


def add_to_an_absent_one(own):
    sums = np.load(own.folder / "a_sums.npy")
    assert sums[0, 2] == 0, "record 0 has two responses"
    sums[0, 2] = -1.0
    np.save(own.folder / "a_sums.npy", sums)


def lose_a_response(own):
    tokens = TokenDataset(own.data)
    lengths = tokens.scored_lengths.copy()
    lengths[3, 4] = 0
    fields = {"tokenizer": tokens.manifest["tokenizer"]}
    write_scores(own.folder / "b", own.read(), lengths, **fields)


def count_other_tokens(own):
    tokens = TokenDataset(own.data)
    lengths = tokens.scored_lengths.copy()
    lengths[3, 1] += 1
    fields = {"tokenizer": tokens.manifest["tokenizer"]}
    write_scores(own.folder / "b", own.read(), lengths, **fields)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            judge_again,
            r"record 'q3' \(1 such records\) has the scores \[1.0, 2.0, 3.0, 0.0, 1.0\] .*data, "
            r"expected \[1.0, 9.0, 3.0, 0.0, 1.0\] as in the records: prepare them again",
        ),
        (forget_a_score, r"has the scores \[1.0, 2.0, 3.*expected \[1.0, nan, 3"),
        (drop_scores, r"record 'q0' \(6 such records\) has the scores \[nan, nan\] in"),
        (add_to_an_absent_one, "record 'q0': 'response_2' adds up to 0.0 in .* expected -1.0 by"),
        (lose_a_response, "record 'q3' has 4 responses, expected 5; score the records"),
        (count_other_tokens, r"record 'q3': .* log-probs of \[\d+, \d+, \d+, \d+, \d+\] tokens, "),
    ],
)
def test_what_is_wrong_is_named(own, change, expected):
    change(own)
    _, errors = checked(own)
    assert any(re.search(expected, error) for error in errors.values()), errors


def test_the_summary_of_lists(job, capsys):
    store = LogprobStore(job.folder / "b")
    print_summary(store, [line(i)["domain"] for i in range(24)])
    printed = capsys.readouterr().out.splitlines()
    sizes = [len(line(i)["responses"]) for i in range(24) if i != MASKED]
    total, tokens = store.all_sums.sum(), store.token_counts.sum()
    assert printed[2].split()[-1] == "responses"
    expected = ["all", "24", "1", str(tokens), f"{total / tokens:.3f}", str(sum(sizes))]
    assert printed[6].split() == expected
    by_size = [f"{sizes.count(n)} of {n} responses" for n in (2, 3, 4, 5)]
    assert printed[7] == f"lists: {', '.join(by_size)}"


def inspected(job, number: int, method: str, **options) -> list[str]:
    given: Any = {"data": str(job.data), "id": f"q{number}", "sources": str(job.sources)}
    found = inspect_record(InspectionJob(**given, method=resolve(method, **options)))
    return "\n".join(found).splitlines()


def column(lines: list[str], title: str, at: int) -> dict[str, float]:
    """Numbers by response of the table that begins with a title."""
    rows = lines[lines.index(title) + 2 :]
    return {row.split()[0]: float(row.split()[at]) for row in rows if row.startswith("response_")}


def stored(job, number: int) -> dict[str, np.ndarray]:
    """Sums by model, of those that take part in a record."""
    known = ["pivot", "a"]
    if number != MASKED and line(number)["domain"] != "law":
        known.append("b")
    return {name: LogprobStore(job.folder / name).sums(number) for name in known}


@pytest.mark.parametrize("number", range(24))
def test_what_fuserlhf_makes_of_a_list(job, number):
    """Residuals and loss by the formula, in plain floats, of the responses that have a score."""
    rewards = {i: r for i, r in enumerate(line(number)["scores"]) if r is not None}
    lines, beta = inspected(job, number, "fuserlhf", beta=0.25), 0.25
    if len(rewards) < 2:
        assert f"no response is used: {NO_SCORES}; training leaves this record out" in lines
        assert not any(text.startswith("loss ") for text in lines)
        return
    names = [f"response_{i}" for i in rewards]
    assert f"used, in this order: {', '.join(names)}" in lines
    sums = stored(job, number)
    weights = {"pivot" if name == "initial" else name: w for name, w in WEIGHTS.items()}
    whole = sum(weights[name] for name in sums)
    residuals = []
    for i, reward in rewards.items():
        fused = sum(weights[name] / whole * total[i] for name, total in sums.items())
        residuals.append(reward - beta * (sums["pivot"][i] - fused))
    title = "residual: the same number for all responses where the loss is lowest"
    assert column(lines, title, 1) == dict(zip(names, rewards.values(), strict=True))
    found = column(lines, title, 2)
    assert found == pytest.approx(dict(zip(names, residuals, strict=True)), abs=6e-5)
    variance = np.var(residuals, ddof=1)
    assert float(lines[-2].split()[1]) == pytest.approx(math.sqrt(variance), abs=6e-5)
    assert float(lines[-1].split()[1]) == pytest.approx(variance / (2 * beta), abs=1e-4)


def test_what_pad_makes_of_two_responses(job):
    """Rankings of two are a coin: KL between two of them, of beta times means."""
    lines, sums = inspected(job, 0, "pad"), stored(job, 0)
    counts = LogprobStore(job.folder / "pivot").counts(0)
    means = {name: total / counts.clip(1) for name, total in sums.items()}
    teacher = (means["a"] + means["b"]) / 2
    chance = [1 / (1 + math.exp(10 * (m[1] - m[0]))) for m in (teacher, means["pivot"])]
    p, q = chance
    loss = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(lines[-1].split()[1]) == pytest.approx(loss, abs=1e-4)
    title = "residual: the same number for all responses where the loss is lowest"
    expected = {f"response_{i}": 10 * (means["pivot"][i] - teacher[i]) for i in range(2)}
    assert column(lines, title, 2) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("number", range(12))
def test_a_pair_method_takes_the_best_and_the_worst(job, number):
    scores = [math.nan if s is None else s for s in line(number)["scores"]]
    lines = inspected(job, number, "infifpo", fusion="average", clip=False)
    if np.nanmin(scores) == np.nanmax(scores):
        why = NO_SCORES if np.isfinite(scores).sum() < 2 else NO_CONTRAST
        assert f"no response is used: {why}; training leaves this record out" in lines
        return
    best, worst = int(np.nanargmax(scores)), int(np.nanargmin(scores))
    assert f"used, in this order: response_{best}, response_{worst}" in lines
    sums = stored(job, number)
    counts = LogprobStore(job.folder / "pivot").counts(number).clip(1)
    own = sums.pop("pivot") / counts
    ratios = own - np.mean(list(sums.values()), axis=0) / counts
    loss = -math.log(1 / (1 + math.exp(-2.5 * (ratios[best] - ratios[worst]))))
    assert float(lines[-1].split()[1]) == pytest.approx(loss, abs=6e-5)


def test_without_a_method_nothing_is_said_of_its_use(job):
    """What no method changes is shown; pairs have a usual method, lists have none."""
    given: Any = {"data": str(job.data), "id": "q3", "sources": str(job.sources)}
    lines = "\n".join(inspect_record(InspectionJob(**given))).splitlines()
    assert lines[-1].startswith("b ") and "response_4" in lines[-1], "the table of log-probs"
    assert "how a list is used is up to the method, and no --method was given" in lines
    assert not any("not used" in x or "used, in this order" in x for x in lines)
    used = [x for x in inspected(job, 3, "infifpo") if ", not used:" not in x]
    assert {x for x in used if re.match(r"(initial pivot|a|b) +response_", x)} <= set(lines)


def test_lists_without_scores_say_which_method_needs_none(own):
    lines = [json.loads(text) for text in own.records.read_text().splitlines()]
    write_jsonl(own.records, *[{k: v for k, v in x.items() if k != "scores"} for x in lines])
    folder = str(own.folder / "tokenizer")
    prepare(PreparationJob([str(own.records)], folder, str(own.data)))
    for method in ("infifpo", "fuserlhf"):
        with pytest.raises(UserError, match="has no scores .* --method pad needs none"):
            inspected(own, 3, method)
    assert inspected(own, 3, "pad")[-1].startswith("loss ")
    given: Any = {"data": str(own.data), "id": "q3", "sources": str(own.sources)}
    assert "no --method was given" in "\n".join(inspect_record(InspectionJob(**given)))


def test_every_response_is_shown(job):
    """Record 3: five responses, all but the first cut. Record 4: two, one without a score."""
    text = "\n".join(inspected(job, 3, "infifpo"))
    tokens = TokenDataset(job.data).response_lengths[3]
    for i, (length, score) in enumerate(zip(tokens, (1, 2, 3, 0, 1), strict=True)):
        known = f"response_{i}, {length} tokens, {length - (i > 0)} of them scored, score {score}"
        cut = ", cut, without its end of turn" if i else ""
        unused = "" if i in (2, 3) else ", not used"
        assert f"\n{known}{cut}{unused}:\n{line(3)['responses'][i]}<|im_end|>" in text
    few = inspected(job, 4, "fuserlhf")
    assert any(re.fullmatch(r"response_0, \d+ tokens, \d+ of .*, no score:", x) for x in few)
    table = [x for x in few if re.match(r"(initial pivot|a|b) +response_", x)]
    assert len(table) == 6, "three models, two responses, and none that is absent"


def test_tokens_of_lists_that_were_read_as_such(job, tmp_path):
    """Records that rate several responses are read again as infifpo prepare --lists read them."""
    answers = [{"answer": f"so {i}", "rank": 3 - i} for i in range(3)]
    path = write_jsonl(tmp_path / "rated.jsonl", {"id": "n", "prompt": "w?", "answers": answers})
    folder = str(job.folder / "tokenizer")
    prepare(PreparationJob([str(path)], folder, str(tmp_path / "rated"), lists=True))
    tokens, records = TokenDataset(tmp_path / "rated"), read_records(path, lists=True)
    fields = {"tokenizer": tokens.manifest["tokenizer"]}
    write_scores(tmp_path / "pivot", records, tokens.scored_lengths, **fields)
    (tmp_path / "sources.yaml").write_text("initial: pivot\n")
    given: Any = {"data": str(tmp_path / "rated"), "sources": str(tmp_path / "sources.yaml")}
    method = resolve("dpo")
    lines = "\n".join(inspect_record(InspectionJob(**given, id="n", tokens=True, method=method)))
    assert "used, in this order: response_2, response_0" in lines
    store = LogprobStore(tmp_path / "pivot")
    for r in range(3):
        shown = re.search(rf"^response_{r}, tokens: (.*)$", lines, re.M)
        assert shown is not None
        values = [float(x) for x in re.findall(r"-\d\.\d{3}", shown[1])]
        assert values == pytest.approx(store.logprobs(0, r).tolist(), abs=6e-4)
    notes = list(check_data(DataJob(**given)))
    assert all(c.error is None for c in notes), notes
