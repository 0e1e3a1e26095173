"""A sample of support/fuzzing.py's inputs, others each day; by itself it runs 10,000 a reader."""

import pytest

from support.fuzzing import fuzz
from support.readers import READERS, write_good_files
from support.seeds import seed


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "good"
    folder.mkdir()
    write_good_files(folder)
    return folder


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused(good, name):
    found, refused, _ = fuzz(name, good, seed(), 0, 80)
    assert not found, "\n".join(found)
    assert refused > 20


@pytest.mark.parametrize("name", READERS)
def test_good_files_are_read(good, name):
    before = {path: path.read_bytes() for path in good.rglob("*") if path.is_file()}
    READERS[name].read(good)  # raises what a damaged one does
    assert {path: path.read_bytes() for path in good.rglob("*") if path.is_file()} == before
