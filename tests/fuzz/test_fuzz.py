"""A sample of fuzz.py's inputs, another one each day; fuzz.py itself runs 10,000 a reader."""

import datetime

import pytest
from fuzz import fuzz
from readers import READERS, write_good_files


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "good"
    folder.mkdir()
    write_good_files(folder)
    return folder


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused(good, name):
    found, refused, _ = fuzz(name, good, datetime.date.today().toordinal(), 0, 80)
    assert not found, "\n".join(found)
    assert refused > 20


@pytest.mark.parametrize("name", READERS)
def test_good_files_are_read(good, name):
    before = {path: path.read_bytes() for path in good.rglob("*") if path.is_file()}
    READERS[name].read(good)  # raises what a damaged one does
    assert {path: path.read_bytes() for path in good.rglob("*") if path.is_file()} == before
