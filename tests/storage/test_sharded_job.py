"""A job in shards, alone: claimed, interrupted, gone on with, joined; of lines and of arrays."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.sharded_job import PLAN, ShardedJob, accept_finished, different

COUNT = 7
JOB = {"model": "m", "seed": 3, "tokenizer": {"path": "/a", "sha256": "x"}, "domains": ("law",)}


def write_lines(file, number):
    file.write(b"".join(b'{"n": %d}\n' % (number * 3 + i) for i in range(3)))


def write_arrays(file, number):
    np.savez(file, n=np.arange(number * 3, number * 3 + 3))


def read_lines(file):
    return [json.loads(line)["n"] for line in file]


def read_arrays(file):
    with np.load(file) as content:
        return content["n"].tolist()


@pytest.fixture(params=[(".jsonl", write_lines, read_lines), (".npz", write_arrays, read_arrays)])
def kind(request):
    return request.param


def names(job):
    return sorted(path.name for path in job.folder.iterdir())


def test_from_the_claim_to_the_end(tmp_path, kind):
    """Two processes that know nothing of each other, one of them stopped in a shard."""
    suffix, write, read = kind
    jobs = [ShardedJob(tmp_path / "out", suffix) for _ in range(2)]
    assert jobs[0].folder == tmp_path / "out.shards"
    for job in jobs:
        job.claim(JOB)
        assert job.missing(COUNT) == list(range(COUNT))
    for number in (4, 1, 6):
        with jobs[number % 2].writing(number) as file:
            write(file, number)
    with pytest.raises(KeyboardInterrupt), jobs[0].writing(2) as file:
        file.write(b"half of it")
        raise KeyboardInterrupt
    assert jobs[1].missing(COUNT) == [0, 2, 3, 5]
    assert names(jobs[0]) == sorted([PLAN, *(f"00000{n}{suffix}" for n in (1, 4, 6))])
    missing = r"000000\..* is missing although its rank has finished; do all nodes see this folder"
    with pytest.raises(UserError, match=missing):
        list(jobs[0].files(COUNT))
    again = ShardedJob(tmp_path / "out", suffix)
    again.claim(JOB)
    for number in again.missing(COUNT):
        with again.writing(number) as file:
            write(file, number)
    joined = [read(file) for file in again.files(COUNT)]
    assert joined == [[n * 3, n * 3 + 1, n * 3 + 2] for n in range(COUNT)]
    for job in jobs:
        job.remove()
    assert not any(tmp_path.iterdir())


def test_what_a_kill_leaves_is_written_again(tmp_path, kind):
    """A file aside is no shard, and stands in nobody's way."""
    suffix, write, read = kind
    job = ShardedJob(tmp_path / "out", suffix)
    job.claim(JOB)
    (job.folder / f"000000{suffix}.partial").write_bytes(b"half of it")
    (job.folder / f".000000{suffix}.partial").write_bytes(b"half of it, by an older version")
    job.claim(JOB)
    assert job.missing(1) == [0]
    with job.writing(0) as file:
        write(file, 0)
    assert [read(file) for file in job.files(1)] == [[0, 1, 2]]
    assert f"000000{suffix}.partial" not in names(job)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 4}, "its seed is 3, this one's is 4"),
        ({"extra": True}, "its extra is None, this one's is True"),
        ({"domains": None}, r"its domains is \['law'\], this one's is None"),
        ({"tokenizer": {"path": "/a", "sha256": "y"}}, "its sha256 is 'x', this one's is 'y'"),
    ],
)
def test_another_jobs_shards_are_refused(tmp_path, change, said):
    job = ShardedJob(tmp_path / "out", ".npz", free=("path",))
    job.claim(JOB)
    with job.writing(0) as file:
        write_arrays(file, 0)
    expected = f"out.shards holds shards of another job: {said}; delete the folder or choose"
    with pytest.raises(UserError, match=expected):
        job.claim(JOB | change)
    assert job.missing(1) == []
    job.claim(JOB | {"tokenizer": {"path": "/moved", "sha256": "x"}})


def test_shards_without_a_plan_may_be_anybodys(tmp_path):
    job = ShardedJob(tmp_path / "out", ".npz")
    job.folder.mkdir()
    job.path(0).touch()
    with pytest.raises(UserError, match="shards of nobody knows which job: plan.json is missing"):
        job.claim(JOB)
    assert job.path(0).exists()


def test_a_claim_beside_another_process_keeps_its_shards(tmp_path, monkeypatch):
    """It sees no plan, and then the other one's shards."""
    job, other = (ShardedJob(tmp_path / "out", ".npz") for _ in range(2))
    mkdir = Path.mkdir

    def late(path, *args, **options):
        mkdir(path, *args, **options)
        if path == job.folder:
            monkeypatch.undo()
            other.claim(JOB)
            other.path(0).touch()

    monkeypatch.setattr(Path, "mkdir", late)
    job.claim(JOB)
    assert job.missing(2) == [1]


def test_interrupted_jobs_of_before_go_on(tmp_path):
    """Their plans are JSON of other spacing, their shards have the same names."""
    for suffix, indent in ((".npz", 1), (".jsonl", 2)):
        job = ShardedJob(tmp_path / suffix, suffix)
        job.folder.mkdir()
        (job.folder / "plan.json").write_text(json.dumps(JOB, indent=indent))
        (job.folder / f"000001{suffix}").touch()
        job.claim(JOB)
        assert job.missing(3) == [0, 2]


def test_a_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    job = ShardedJob(tmp_path / "out", ".npz")
    expected = "is not there for rank 3, expected a folder that all nodes see"
    with pytest.raises(UserError, match=expected), job.writing(0) as file:
        write_arrays(file, 0)


def test_differences_look_into_what_is_free():
    assert different({"a": {"path": 1, "b": 2}}, {"a": {"path": 5, "b": 2}}, ("path",)) is None
    assert different({"path": 1}, {"path": 2}) == "its path is 2, this one's is 1"
    assert different({"a": 1, "b": 2}, {"b": 3, "a": 4}) == "its a is 4, this one's is 1"


def test_finished_output(tmp_path, capsys):
    """Of this job it is accepted; of another, or with a file gone, what to do is said."""
    manifest = {"model": "a", "path": "there", "count": 3}

    def gone() -> None:
        raise UserError("x.bin is missing")

    def accept(wanted, read=lambda: None):
        accept_finished(tmp_path / "x", wanted, manifest, read, {"path"})

    accept({"model": "a", "path": "here"})
    assert capsys.readouterr().out == f"{tmp_path}/x is complete already\n"
    with pytest.raises(UserError, match="of another job: its model is 'a', this one's is 'b'"):
        accept({"model": "b"})
    with pytest.raises(UserError, match="x.bin is missing; delete .*x.json first"):
        accept({"model": "a"}, gone)
