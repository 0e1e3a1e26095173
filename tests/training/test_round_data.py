"""What a round's steps take of its pairs, how many there are, and what is said of both."""

import collections
import dataclasses
import itertools
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_infifpo.methods import resolve
from megatron_infifpo.references.sources import Source, SourcesConfig
from megatron_infifpo.rows.layout import PLAIN
from megatron_infifpo.rows.plan import plan_step
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.training import provider
from megatron_infifpo.training.data import Datasets, describe, describe_sources, lengths
from support.datasets import record, write_scores, write_tokens

PAIRS = 4  # of a step
ARGUMENTS = {
    "seq_length": 1000, "global_batch_size": PAIRS, "eval_interval": None, "save": None,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
    "max_position_embeddings": 4096,
    "world_size": 1, "seed": 3, "train_samples": None, "save_interval": None,
    "micro_batch_size": None,
}  # fmt: skip


def space(**fields: Any) -> Any:
    """What has these attributes, in the place of a run or of a part of it."""
    return SimpleNamespace(**fields)


def opened(folder, count, weights=(1.0, 1.0)):
    folder.mkdir(exist_ok=True)
    records = [record(i) for i in range(count)]
    tokens = write_tokens(folder, records)
    for name in ("pivot", "one"):
        write_scores(folder / name, records, tokens.response_lengths)
    sources = (Source("one", str(folder / "one"), weight=weights[0]),)
    config = SourcesConfig(str(folder / "pivot"), sources, initial_weight=weights[1])
    return PreferenceDataset(tokens.prefix, config)


@pytest.fixture
def taken(monkeypatch):
    """Indices of so many steps, as Megatron gets them once so many are done."""
    monkeypatch.setattr(provider, "mpu", space(
        get_data_parallel_rank=lambda: 0, get_data_parallel_world_size=lambda: 1,
        get_context_parallel_rank=lambda: 0,
        is_pipeline_last_stage=lambda: True,
    ))  # fmt: skip
    monkeypatch.setattr(provider, "get_num_microbatches", lambda: 1)

    def take(datasets, done, steps):
        monkeypatch.setattr(provider, "pairs_seen", lambda: done * PAIRS)
        batch = space(pairs=PAIRS, max_tokens=1000, rows=PLAIN, seed=3)
        give = provider.DatasetsProvider(
            space(batch=batch), datasets, lambda models: None, lambda: None
        )
        rows = itertools.islice(give([])[0], steps)
        return [row["indices"].tolist() for row in rows]

    return take


@pytest.mark.parametrize("since", [0, 1, 3, 5, 8])
def test_a_round_takes_each_of_its_pairs_once(taken, tmp_path, since):
    """Whatever the steps before had; and goes on where it is resumed."""
    datasets = Datasets(opened(tmp_path, 3 * PAIRS), None, since)
    steps = taken(datasets, since, 3)
    assert sorted(itertools.chain(*steps)) == list(range(3 * PAIRS))
    assert taken(datasets, since + 1, 2) == steps[1:]
    assert taken(dataclasses.replace(datasets, since=0), 0, 3) == steps


def described(**given):
    config: dict[str, Any] = {
        "preference_epochs": None,
        "micro_batch_tokens": 10**6,
        "next_round": False,
    }
    config |= {"stop_at": None, "method": resolve("infifpo")}
    return space(**config | given)


def test_epochs_are_of_the_round(tmp_path):
    datasets = Datasets(opened(tmp_path, 3 * PAIRS), None, 5)
    found = lengths(
        described(preference_epochs=2), ARGUMENTS | {"train_iters": None}, datasets, PLAIN
    )
    assert found["train_iters"] == 5 + 2 * 3


@pytest.mark.parametrize(
    "flags, since, expected",
    [
        ({}, 0, "9 steps of 4 are 3.00 epochs"),
        ({"stop_at": 3}, 0, "9 steps of 4 are 3.00 epochs"),
        ({"stop_at": 3, "next_round": True}, 0, "3 steps of 4 are 1.00 epochs"),
        ({"stop_at": 6, "next_round": True}, 3, "3 steps of 4 are 1.00 epochs"),
        ({"next_round": True}, 6, "3 steps of 4 are 1.00 epochs"),
    ],
)
def test_what_is_said(tmp_path, flags, since, expected):
    run = space(
        config=described(**flags),
        batch=space(max_tokens=1000, pairs=PAIRS, micro=2),
        schedule=space(steps=9),
        folders=space(save="x"),
        save_interval=3,
    )
    datasets = Datasets(opened(tmp_path, 3 * PAIRS), None, since)
    said = describe(run, datasets, since)
    assert f"; {expected}, " in said and "are done" not in said
    assert "; 1 steps are done;" in describe(run, datasets, since + 1)


def test_domains_that_are_too_long_are_named(tmp_path):
    """Before training, with what of each is lost, in training and in validation."""

    def of(folder, domains, masked=()):
        folder.mkdir()
        records = [record(i, domain=domain) for i, domain in enumerate(domains)]
        tokens = write_tokens(folder, records)
        write_scores(folder / "pivot", records, tokens.response_lengths, masked=masked)
        return PreferenceDataset(tokens.prefix, SourcesConfig(str(folder / "pivot")))

    train = of(tmp_path / "a", [("math", "code", "law")[i % 3] for i in range(15)], masked=[0, 11])
    valid = of(tmp_path / "b", ["code", "law"])
    train.align_domains(valid.domains)

    def said(limit):
        run = space(
            config=described(), schedule=space(steps=1), folders=space(save=None),
            batch=space(max_tokens=limit, pairs=2, micro=1),
        )  # fmt: skip
        return describe(run, Datasets(train, valid), 0).splitlines()

    # Tokens of the longest response with its prompt, counted by hand: math 30, 42, 35, 46, 39;
    # code 39, 51, 43, 41, 48; law 48, 42, 52, 49, 57; of validation 30 and 39.
    first, *others = said(45)
    assert first.startswith("pairs: 7 used, 8 left out (7 longer than --seq-length 45; 1 without ")
    assert others == [
        "longer than --seq-length 45: "
        "law 4 of 5 (longest 57), code 2 of 5 (longest 51), math 1 of 5 (longest 46)"
    ]
    assert said(50)[1:] == [
        "longer than --seq-length 50: law 2 of 5 (longest 57), code 1 of 5 (longest 51)"
    ]
    assert said(38)[2:] == ["validation: longer than --seq-length 38: law 1 of 1 (longest 39)"]
    assert len(said(57)) == 1, "all fit"


def test_a_budget_holds_in_the_rounds_own_steps(tmp_path):
    """Neither fewer steps are planned than it has, nor those of others."""
    train = opened(tmp_path, 3 * PAIRS)
    pairs = train.pair_lengths(PLAIN)

    def longest(steps):  # with rows of two pairs
        shape = {"global_batch_size": PAIRS, "data_parallel_size": 1, "num_microbatches": 2}
        plans = (plan_step(pairs, seed=3, step=s, **shape)[0] for s in range(steps))
        return [max(pairs[row].sum() for row in plan) for plan in plans]

    most = np.maximum.accumulate(longest(60))
    fits = int(np.argmax(most > most[2]))  # steps that stay within what the first three need
    assert 3 <= fits < 60, "these pairs cannot tell"
    for flags, since, expected in (
        ({"stop_at": 100 + fits, "next_round": True}, 100, 2),
        ({"stop_at": 100 + fits + 1, "next_round": True}, 100, 1),
        ({"stop_at": 100 + fits}, 100, 1),
    ):
        config = described(micro_batch_tokens=int(most[2]), **flags)
        found = lengths(
            config, ARGUMENTS | {"train_iters": 200}, Datasets(train, None, since), PLAIN
        )
        assert found["micro_batch_size"] == expected, (flags, fits)


@pytest.mark.parametrize(
    "method, options, weights, expected",
    [
        ("infifpo", {}, (1.0, 1.0), None),
        ("dpo", {}, (1.0, 1.0), None),
        (
            "infifpo",
            {},
            (0.5, 1.0),
            "weights .*one 0.5, initial 1. have no effect: --fusion is max",
        ),
        ("infifpo", {}, (1.0, 2.0), "have no effect: --fusion is max-margin"),
        ("dpo", {}, (0.5, 1.0), "have no effect: the reference is the initial pivot"),
        ("fuserlhf", {}, (0.7, 0.3), "weights of the fusion: one 0.7, initial 0.3$"),
        ("fuserlhf", {}, (1.0, 1.0), "weights of the fusion: one 1, initial 1; all are equal$"),
        ("infifpo", {"fusion": "weighted"}, (0.7, 0.3), "the initial pivot is no source"),
    ],
)
def test_weights_are_said(tmp_path, method, options, weights, expected):
    said = next(describe_sources(resolve(method, **options), opened(tmp_path, 4, weights)), None)
    assert said == expected if expected is None else re.search(expected, said or "")


def test_rows_are_spread_over_rounds(taken, tmp_path):
    """More steps than an epoch: the round's own second permutation follows."""
    datasets = Datasets(opened(tmp_path, 10), None, 7)
    counts = collections.Counter(itertools.chain(*taken(datasets, 7, 5)))
    assert counts == dict.fromkeys(range(10), 2)
