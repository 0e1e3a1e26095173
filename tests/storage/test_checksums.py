"""Damage of a checkpoint is noticed by whoever reads it, where it is and nowhere else."""

import json
import os
import shutil
import zlib
from pathlib import Path

import pytest

from megatron_infifpo.convert.fingerprint import weights_fingerprint
from megatron_infifpo.errors import UserError
from megatron_infifpo.storage import checksums
from megatron_infifpo.storage.checksums import Checksums, verify_share


@pytest.fixture
def copy(setup, tmp_path) -> Path:
    """A copy of the imported pivot."""
    return Path(shutil.copytree(setup.pivot, tmp_path / "pivot"))


def spoil(path: Path, start: int, content: bytes = bytes(64)) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        assert file.read(len(content)) != content
        file.seek(start)
        file.write(content)


def data_file(folder: Path) -> Path:
    return max((folder / "release").glob("*.distcp"), key=os.path.getsize)


def test_they_are_of_the_files(copy):
    content = json.loads((copy / "release" / "checksums.json").read_text())
    assert set(content["files"]) == {
        path.name for path in (copy / "release").iterdir() if path.name != "checksums.json"
    }
    for name, entry in content["files"].items():
        whole = (copy / "release" / name).read_bytes()
        assert entry == {"bytes": len(whole), "crc32": f"{zlib.crc32(whole):08x}"}


@pytest.mark.parametrize("part", range(5))
def test_zeroed_bytes(copy, part):
    path = data_file(copy)
    whole = path.read_bytes()
    start = next(i for i in range(part * len(whole) // 5, len(whole), 64) if any(whole[i : i + 64]))
    spoil(path, start)
    with pytest.raises(UserError, match=r"\.distcp is damaged in bytes 0 to .*; copy or make"):
        verify_share(Checksums(copy / "release"), 0, 1)
    with pytest.raises(UserError, match="is damaged|cannot read"):
        weights_fingerprint(copy)


@pytest.mark.parametrize("what", ["cut", "cut unseen", "missing", "metadata", "sums", "algorithm"])
def test_other_damage(copy, what):
    path, sums = data_file(copy), copy / "release" / "checksums.json"
    if what.startswith("cut"):
        os.truncate(path, path.stat().st_size - 100)
        expected = r"has \d+ bytes, expected \d+: the checkpoint is damaged"
    if what == "cut unseen":
        sums.unlink()
    if what == "missing":
        path.unlink()
        expected = "is missing: the checkpoint is damaged"
    if what == "metadata":  # such that it is still a pickle
        content = (copy / "release" / ".metadata").read_bytes()
        spoil(copy / "release" / ".metadata", content.index(b"final_layernorm"), b"F")
        expected = r"\.metadata is damaged"
    if what == "sums":
        sums.write_text(sums.read_text()[:-20])
        expected = "checksums.json is broken"
    if what == "algorithm":
        sums.write_text(sums.read_text().replace("crc32", "md5", 1))
        expected = "checksums.json is broken .unknown kind 'md5'"
    with pytest.raises(UserError, match=expected):
        weights_fingerprint(copy)


def test_without_any(copy):
    """As Megatron and older versions write them."""
    before = weights_fingerprint(copy)
    (copy / "release" / "checksums.json").unlink()
    assert weights_fingerprint(copy) == before
    verify_share(Checksums(copy / "release"), 0, 1)


def test_ranks_share_blocks_and_readers_see_theirs(tmp_path, monkeypatch):
    """Small blocks: each is looked at by one of three ranks, and a range by its own blocks."""
    monkeypatch.setattr(checksums, "BLOCK", 64)
    monkeypatch.setattr(checksums, "_PIECE", 16)
    for name, size in {"__0_0.distcp": 1000, "__0_1.distcp": 64, ".metadata": 0}.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    (tmp_path / "metadata.json").write_text("{}")
    checksums.write_checksums(tmp_path, 0, 1)
    assert len(Checksums(tmp_path).all_blocks()) == 16 + 1 + 0 + 1
    for rank in range(3):
        verify_share(Checksums(tmp_path), rank, 3)
    path = tmp_path / "__0_0.distcp"
    spoil(path, 640, bytes(1) if path.read_bytes()[640] else b"\1")
    found = Checksums(tmp_path)
    found.check_range(path.name, 0, 640)
    found.check_range(path.name, 704, 1000)
    with pytest.raises(UserError, match="__0_0.distcp is damaged in bytes 640 to 704"):
        found.check_range(path.name, 700, 710)
    bad = []
    for rank in range(3):
        try:
            verify_share(Checksums(tmp_path), rank, 3)
        except UserError:
            bad.append(rank)
    assert bad == [1]
