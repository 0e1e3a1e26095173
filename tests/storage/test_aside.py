"""What has its name is whole: files, several files with a manifest, and folders."""

import os
from pathlib import Path

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.aside import Aside, make_folder, whole_file, whole_folder, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError), whole_file(path) as aside:
        aside.write_text("half")
        assert path.read_text() == "old" and names(tmp_path) == ["a.json", "a.json.partial"]
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]
    with whole_file(path) as aside:
        aside.write_bytes(b"new")
    assert path.read_text() == "new" and names(tmp_path) == ["a.json"]


def test_processes_do_not_write_into_each_others_files(tmp_path):
    with whole_file(tmp_path / "a", by_process=True) as aside:
        assert str(os.getpid()) in aside.name
        aside.write_text("mine")
    assert names(tmp_path) == ["a"]


def test_the_last_file_is_missing_while_the_others_are_replaced(tmp_path, monkeypatch):
    """A reader begins with the manifest, so it never sees a mix of old and new."""
    seen, replace = [], os.replace

    def look(source, target):
        seen.append((os.path.basename(target), (tmp_path / "x.json").exists()))
        replace(source, target)

    for round_ in ("old", "new"):
        with Aside() as files:
            for name in ("x.bin", "x.idx", "x.json"):
                files.path(tmp_path / name).write_text(round_)
            monkeypatch.setattr(os, "replace", look)
    assert seen == 2 * [("x.bin", False), ("x.idx", False), ("x.json", False)]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"] * 3


def test_files_that_were_not_written_publish_none(tmp_path):
    write_text(tmp_path / "x.json", "old")
    with pytest.raises(FileNotFoundError), Aside() as files:
        files.path(tmp_path / "x.bin").write_text("new")
        files.path(tmp_path / "x.json")  # and its writing is forgotten
    assert names(tmp_path) == ["x.json"] and (tmp_path / "x.json").read_text() == "old"


def test_a_folder_is_whole_or_not_there(tmp_path):
    save, waits = tmp_path / "save", []
    with pytest.raises(OSError), whole_folder(save) as aside:
        (aside / "half").write_text("")
        raise OSError("the disk is full")
    assert names(tmp_path) == []
    save.mkdir()  # an empty one gives way
    (tmp_path / ".save.partial").mkdir()  # of a process that was killed
    (tmp_path / ".save.partial" / "leftover").write_text("")
    with whole_folder(save, wait=lambda: waits.append(names(tmp_path))) as aside:
        (aside / "inside").mkdir()
        (aside / "inside" / "file").write_text("whole")
    assert names(tmp_path) == ["save"] and names(save) == ["inside"]
    assert waits == [[".save.partial", "save"], [".save.partial", "save"], ["save"]]


def test_other_ranks_leave_the_folder_to_the_first(tmp_path):
    (tmp_path / ".save.partial").mkdir()
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "save", first=False) as aside:
        assert aside.is_dir()
        raise RuntimeError
    assert names(tmp_path) == [".save.partial"]


def test_a_folder_that_cannot_be(tmp_path):
    """In a sentence; a file that is missing elsewhere keeps its traceback."""
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "x", Path("/proc/x"), Path("/proc/x/z")):
        with pytest.raises(UserError, match=f"cannot make the folder {path}: "):
            make_folder(path)
    with pytest.raises(UserError, match="cannot make the folder"), whole_folder("/proc/x/z"):
        pass
    assert names(tmp_path) == ["a", "file"]
