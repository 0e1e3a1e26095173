"""Soft-target data sets: what is read is what was written, and damage is named."""

import json
import warnings
from typing import Any

import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.references.soft_target_writer import SoftTargetWriter
from megatron_infifpo.references.soft_targets import SEVERAL, SoftTargets, SoftTargetStore
from support.datasets import list_record, record, write_tokens

RECORDS = [record(i) for i in range(4)]
TOP = 3


@pytest.fixture
def tokens(tmp_path):
    return write_tokens(tmp_path, RECORDS)


def fields(tokens, **more) -> dict[str, Any]:
    manifest = {name: tokens.manifest[name] for name in ("records_sha256", "tokens_sha256")}
    return manifest | {
        "top_k": TOP, "sources": ["a", "initial"], "include_initial": True, "ce_per": "byte",
        "ambiguous": "digits", "tokenizer": tokens.manifest["tokenizer"], "models": {},
        "masked": {}, "coverage": {}, "versions": {},
    } | more  # fmt: skip


def targets(length: int, seed: int) -> SoftTargets:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(TOP + 1, 0.3), length)
    ids = np.stack([rng.permutation(50)[:TOP] for _ in range(length)]).astype(np.int32)
    sources = rng.choice(np.array([0, 1, 2, SEVERAL], np.uint8), length)
    ids[sources == 0], probs[sources == 0] = -1, [0] * TOP + [1]
    return SoftTargets(
        ids, probs[:, :-1].astype(np.float32), probs[:, -1].astype(np.float32), sources,
        np.array([[0, 2]], np.int32), np.array([-1e4], np.float32), np.array([0.5], np.float32),
    )  # fmt: skip


def write(prefix, tokens, **more) -> list[SoftTargets | None]:
    """Targets of the first response of all records but the last."""
    groups = more.pop("groups", None)
    lengths = tokens.scored_lengths[:, 0].tolist()
    added: list[SoftTargets | None] = [targets(n, i) for i, n in enumerate(lengths)]
    added[-1] = None
    with SoftTargetWriter(
        prefix, responses=tokens.responses, fusion="mince", groups=groups,
        manifest=fields(tokens, **more),
    ) as writer:  # fmt: skip
        for one in added:
            writer.add([one])
    assert len(writer) == len(RECORDS)
    return added


def test_round_trip(tmp_path, tokens):
    added = write(tmp_path / "soft", tokens)
    store = SoftTargetStore(tmp_path / "soft")
    store.check_against(tokens)
    assert len(store) == 4 and store.top_k == TOP and store.sources == ("a", "initial")
    assert store.fusion == "mince" and store.groups is None
    for index, one in enumerate(added[:-1]):
        found = store.take(index, 0, int(tokens.scored_lengths[index, 0]))
        assert one is not None
        for name in ("ids", "sources", "chunks", "chunk_logps", "chunk_weights"):
            np.testing.assert_array_equal(getattr(found, name), getattr(one, name))
            assert getattr(found, name).dtype == getattr(one, name).dtype
        # Log-probs have 11 bits; what is small is as exact as what is large.
        np.testing.assert_allclose(
            np.log(found.probs + 1e-30), np.log(one.probs + 1e-30), rtol=2e-3
        )
        np.testing.assert_allclose(found.tail, one.tail, rtol=2e-2)
        assert found.probs.dtype == found.tail.dtype == np.float32
        total = found.probs.astype(np.float64).sum(1) + found.tail
        np.testing.assert_allclose(total, 1, atol=2e-7)
        found.ids[:] = 7  # arrays of its own
        assert (store.take(index, 0, len(one.ids)).ids == one.ids).all()


def test_rows_that_sum_to_more_than_one(tmp_path, tokens):
    """What float16 sources add up to: scaled before the log, which is never above 0."""
    length = int(tokens.scored_lengths[0, 0])
    exact, more = targets(length, 0), targets(length, 0)
    exact.probs[0], exact.tail[0] = [1, 0, 0], 0
    more.probs, more.tail = exact.probs * 1.0003, exact.tail * 1.0003
    for name, one in (("exact", exact), ("more", more)):
        with SoftTargetWriter(
            tmp_path / name, responses=tokens.responses, fusion="mince", manifest=fields(tokens)
        ) as writer:
            for _ in RECORDS:
                writer.add([one])
    stored = np.fromfile(tmp_path / "more_logps.bin", np.float16)
    assert (stored <= 0).all() and stored[0] == 0
    there, here = (SoftTargetStore(tmp_path / n).take(0, 0, length) for n in ("exact", "more"))
    # A float32 on the edge between two float16 may fall to either side.
    np.testing.assert_allclose(here.probs, there.probs, rtol=1e-2)
    np.testing.assert_allclose(here.tail, there.tail, rtol=1e-2)


@pytest.mark.parametrize(("index", "response"), [(0, 1), (3, 0)])
def test_responses_without_targets(tmp_path, tokens, index, response):
    write(tmp_path / "soft", tokens)
    found = SoftTargetStore(tmp_path / "soft").take(index, response, 5)
    assert (found.ids == -1).all() and found.ids.shape == (5, TOP)
    assert not found.probs.any() and (found.tail == 1).all() and not found.sources.any()
    assert found.chunks.shape == (0, 2) and found.values is None


def test_groups(tmp_path, tokens):
    groups = [np.array([3, 4, 9]), np.array([1, 2])]
    write(tmp_path / "soft", tokens, groups=groups, ambiguous="group")
    found = SoftTargetStore(tmp_path / "soft").groups
    assert found is not None and [g.tolist() for g in found] == [g.tolist() for g in groups]
    write(tmp_path / "none", tokens, groups=[], ambiguous="group")
    assert SoftTargetStore(tmp_path / "none").groups == []
    # Groups of an older data set of this name are not this one's.
    write(tmp_path / "soft", tokens)
    assert SoftTargetStore(tmp_path / "soft").groups is None


def test_the_largest_id(tmp_path, tokens):
    """As the manifest has it, and as the files have it; the many groups' numbers are no ids."""
    largest = max(int(one.ids.max()) for one in write(tmp_path / "soft", tokens) if one)
    several = [np.array([3, 4])] * 200
    write(tmp_path / "small", tokens, groups=several, ambiguous="group")
    write(tmp_path / "large", tokens, groups=[*several, np.array([1, 777, 2])], ambiguous="group")
    for name, expected in (("soft", largest), ("small", largest), ("large", 777)):
        store = SoftTargetStore(tmp_path / name)
        assert store.largest_id() == expected == store.manifest.pop("largest_id")
        assert store.largest_id() == expected
    with SoftTargetWriter(
        tmp_path / "empty", responses=tokens.responses, fusion="mince", manifest=fields(tokens)
    ) as writer:
        writer.add([])
    store = SoftTargetStore(tmp_path / "empty")
    assert store.largest_id() == store.manifest.pop("largest_id") == store.largest_id() == -1


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 65504, 5.0, -1.0])
def test_damaged_weights_are_refused(tmp_path, tokens, value):
    """Scaled to 1 they would be taught as if nothing had happened; and NumPy warns of nothing."""
    write(tmp_path / "soft", tokens)
    stored = np.fromfile(tmp_path / "soft_logps.bin", np.float16)
    stored[: TOP + 1] = value
    stored.tofile(tmp_path / "soft_logps.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # NumPy's
        store, lengths = SoftTargetStore(tmp_path / "soft"), tokens.scored_lengths[:, 0].tolist()
        store.take(1, 0, lengths[1])
        with pytest.raises(UserError, match="soft targets of record 0 are no probabilities"):
            store.take(0, 0, lengths[0])


def test_values(tmp_path, tokens):
    length = int(tokens.scored_lengths[0, 0])
    given = np.log(np.random.default_rng(0).random((length, 2, TOP))).astype(np.float32)
    given[0, 1] = np.nan
    one = targets(length, 0)
    one.values = given
    with SoftTargetWriter(
        tmp_path / "v", responses=tokens.responses, fusion="none",
        manifest=fields(tokens, ambiguous=None),
    ) as writer:  # fmt: skip
        writer.add([one])
        writer.add([])
    assert not list(tmp_path.glob("v_ids*"))
    store = SoftTargetStore(tmp_path / "v")
    assert store.largest_id() is None is store.manifest["largest_id"]
    found = store.take(0, 0, length)
    assert found.values is not None
    np.testing.assert_allclose(found.values, given, rtol=2**-11, equal_nan=True)
    assert found.ids.shape == (length, 0) and (found.tail == 1).all()
    nothing = store.take(1, 0, 4).values
    assert nothing is not None and nothing.shape == (4, 2, TOP) and np.isnan(nothing).all()


def test_lists_of_unequal_length(tmp_path):
    lists = write_tokens(tmp_path, [list_record(i) for i in range(3)])
    lengths = lists.scored_lengths
    with SoftTargetWriter(
        tmp_path / "l", responses=lists.responses, fusion="mince", manifest=fields(lists)
    ) as writer:
        for row in lengths:
            writer.add([targets(int(n), 1) for n in row if n])
    store = SoftTargetStore(tmp_path / "l")
    for index, row in enumerate(lengths.tolist()):
        for response, length in enumerate(row):
            assert len(store.take(index, response, length).ids) == length


def test_another_length(tmp_path, tokens):
    write(tmp_path / "soft", tokens)
    length = int(tokens.scored_lengths[0, 0])
    with pytest.raises(UserError, match=f"another number of tokens than the {length + 1} of resp"):
        SoftTargetStore(tmp_path / "soft").take(0, 0, length + 1)


def test_other_tokens(tmp_path, tokens):
    write(tmp_path / "soft", tokens)
    write(tmp_path / "other", tokens, tokens_sha256="0" * 64)
    write(tmp_path / "records", tokens, records_sha256="0" * 64)
    for name, message in (
        ("other", "of the tokens is 000000000000"),
        ("records", "of the records"),
    ):
        with pytest.raises(UserError, match=f"{name} do not fit .*fingerprint {message}"):
            SoftTargetStore(tmp_path / name).check_against(tokens)
    more = write_tokens(tmp_path, [*RECORDS, record(9)], "more")
    with pytest.raises(UserError, match="the number of records is 4, expected 5; fuse them again"):
        SoftTargetStore(tmp_path / "soft").check_against(more)
    three = write_tokens(tmp_path, [record(i, pivot=True) for i in range(4)], "three")
    with pytest.raises(UserError, match="list of responses"):
        SoftTargetStore(tmp_path / "soft").check_against(three)


def test_the_fingerprint_is_of_all(tmp_path, tokens):
    write(tmp_path / "a", tokens)
    write(tmp_path / "b", tokens)
    write(tmp_path / "c", tokens, groups=[np.array([1, 2])], ambiguous="group")
    a, b, c = (SoftTargetStore(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


DAMAGE = {
    "no manifest": (lambda p: p(".json").unlink(), "manifest .* is missing"),
    "other format": (
        lambda p: p(".json").write_text('{"format": "x"}'),
        "says format 'x', expected 'megatron_infifpo soft-target dataset'",
    ),
    "no fusion": (
        lambda p: p(".json").write_text(
            json.dumps(
                {k: v for k, v in json.loads(p(".json").read_text()).items() if k != "fusion"}
            )
        ),
        "has no 'fusion'",
    ),
    "no ids": (lambda p: p("_ids.bin").unlink(), r"_ids\.bin is missing"),
    "cut ids": (lambda p: p("_ids.bin").write_bytes(b"1234"), r"_ids\.bin has 4 bytes"),
    "other type": (
        lambda p: p("_ids.idx").write_bytes(p("_chunk_logps.idx").read_bytes()),
        "holds float32 values, expected int32",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path, tokens, name):
    write(tmp_path / "soft", tokens)
    damage, message = DAMAGE[name]
    damage(lambda end: tmp_path / f"soft{end}")
    with pytest.raises(UserError, match=message):
        SoftTargetStore(tmp_path / "soft").take(0, 0, int(tokens.scored_lengths[0, 0]))


@pytest.mark.parametrize("count", [5, -1, 10**30])
def test_another_number_of_records_than_said(tmp_path, tokens, count):
    write(tmp_path / "soft", tokens)
    path = tmp_path / "soft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"count": count}))
    store = SoftTargetStore(tmp_path / "soft")
    with pytest.raises(UserError, match=f"holds 4 records, expected {count}"):
        store.take(0, 0, 1)
    with pytest.raises(UserError, match=f"number of records is {count}, expected 4"):
        store.check_against(tokens)


def test_an_interrupted_write_leaves_nothing(tmp_path, tokens):
    with (
        pytest.raises(KeyboardInterrupt),
        SoftTargetWriter(
            tmp_path / "soft", responses=tokens.responses, fusion="mince", groups=[],
            manifest=fields(tokens),
        ) as writer,
    ):  # fmt: skip
        writer.add([])
        raise KeyboardInterrupt
    assert not list(tmp_path.glob("soft*"))
