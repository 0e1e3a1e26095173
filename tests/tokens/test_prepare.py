"""Preparing as Python makes it: what is refused, and the same bytes as by the command."""

from pathlib import Path

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.tokens.options import TokenizerOptions
from megatron_infifpo.tokens.prepare import PreparationJob, prepare
from support import tiny
from support.tools import run_tool

FILES = (".bin", ".idx", "_ids.bin", "_ids.idx", "_scored.npy", "_domains.npy", ".json")


def test_the_same_bytes_by_python_and_by_the_command(tmp_path):
    tiny.save_tokenizer(tmp_path / "tok", 300)
    records = tiny.write_records(tmp_path / "r.jsonl", 20)
    with records.open("a") as file:
        file.write("{\n")
    job = PreparationJob(
        [str(records)],
        str(tmp_path / "tok"),
        str(tmp_path / "python"),
        on_bad_record="skip",
        tokenizer_options=TokenizerOptions(score="all"),
    )
    assert len(prepare(job)) == 20
    argv = ["--input", str(records), "--tokenizer", str(tmp_path / "tok"), "--score", "all"]
    argv += ["--on-bad-record", "skip", "--output", str(tmp_path / "command")]
    assert run_tool("prepare_preferences", argv) is None
    for end in FILES:
        found = [Path(f"{tmp_path}/{name}{end}").read_bytes() for name in ("python", "command")]
        assert found[0] == found[1], end


def test_jobs_that_cannot_be():
    with pytest.raises(UserError, match="--input is 'r.jsonl', expected a list of files"):
        PreparationJob("r.jsonl", "t", "o")
    with pytest.raises(UserError, match="--on-bad-record is 'mend', expected one of error, skip"):
        PreparationJob(["r.jsonl"], "t", "o", on_bad_record="mend")
