"""The split of the two-stage recipe: whole, disjoint, by prompt, independent of everything else."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import canonical_bytes, read_records
from megatron_infifpo.records.split import is_sft
from support import tiny
from support.datasets import record
from support.tools import run_tool


def run(*argv):
    run_tool("split_preferences", list(map(str, argv)))


@pytest.mark.parametrize("pivot_chosen", [False, True])
def test_parts_hold_every_record_once(tmp_path, pivot_chosen):
    source = tiny.write_records(tmp_path / "all.jsonl", 60, pivot_chosen=pivot_chosen)
    outputs = tmp_path / "sft.jsonl", tmp_path / "pairs.jsonl"
    run("--input", source, "--sft", outputs[0], "--preference", outputs[1])
    parts = [read_records(path) for path in outputs]
    assert all(15 < len(part) < 45 for part in parts)
    together = sorted(canonical_bytes(r) for part in parts for r in part)
    assert together == sorted(canonical_bytes(r) for r in read_records(source))
    assert not {r.prompt[-1]["content"] for r in parts[0]} & {
        r.prompt[-1]["content"] for r in parts[1]
    }


@given(st.integers(0, 10**6), st.integers(0, 5), st.floats(0.1, 0.9))
def test_only_the_prompt_decides(number, seed, share):
    one = record(number)
    other = record(number, domain="math", pivot=True)
    assert is_sft(one, seed=seed, share=share) == is_sft(other, seed=seed, share=share)


def test_more_records_move_none(tmp_path):
    lines = tiny.write_records(tmp_path / "all.jsonl", 40).read_text().splitlines()
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(random.Random(1).sample(lines, 25)) + "\n")
    sides = {}
    for name, source in (("all", tmp_path / "all.jsonl"), ("few", few)):
        sft, pairs = tmp_path / f"{name}-sft.jsonl", tmp_path / f"{name}-pairs.jsonl"
        run("--input", source, "--sft", sft, "--preference", pairs)
        sides[name] = {json.loads(line)["id"] for line in sft.read_text().splitlines()}
    ids = {json.loads(line)["id"] for line in few.read_text().splitlines()}
    assert sides["few"] == sides["all"] & ids


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--share", "1"], "--share is 1.0"),
        (["--share", "0.0001"], "is empty"),
        (["--sft", "./b.jsonl"], "expected two files"),
        (["--sft", "out.json"], "expected a name in .jsonl"),
    ],
)
def test_bad_requests_write_nothing(tmp_path, monkeypatch, argv, expected):
    source = tiny.write_records(tmp_path / "all.jsonl", 5)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected):
        run("--input", source, "--sft", "a.jsonl", "--preference", "b.jsonl", *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["all.jsonl"]
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match="a.jsonl exists"):
        run("--input", source, "--sft", "a.jsonl", "--preference", "b.jsonl")


def test_bad_records_are_left_out_on_demand(tmp_path, capsys):
    source = tiny.write_records(tmp_path / "all.jsonl", 20)
    with source.open("a") as file:
        file.write('{"prompt": "q", "chosen": "a", "source": "x"}\n')
    outputs = tmp_path / "sft.jsonl", tmp_path / "pairs.jsonl"
    argv = "--input", source, "--sft", outputs[0], "--preference", outputs[1]
    with pytest.raises(UserError, match=r"all\.jsonl:21: field 'rejected' is missing"):
        run(*argv)
    run(*argv, "--on-bad-record", "skip")
    assert sum(len(read_records(path)) for path in outputs) == 20
    assert "skipped 1 bad records:" in capsys.readouterr().err
