"""Flags and file formats are those in the files beside this one: a change of them is meant."""

import json

import pytest

from megatron_infifpo.commands.main import COMMANDS
from support import frozen

FLAGS = json.loads((frozen.FROZEN / "flags.json").read_text(encoding="utf-8"))
FORMATS = json.loads((frozen.FROZEN / "formats.json").read_text(encoding="utf-8"))
WRITE = "PYTHONPATH=tests python tests/frozen/write.py"


@pytest.fixture(scope="module")
def flags():
    return frozen.flags()


@pytest.fixture(scope="module")
def formats(setup, ranks, tmp_path_factory):
    return frozen.formats(setup, ranks, tmp_path_factory.mktemp("frozen"))


def test_commands(flags):
    assert set(flags) == set(FLAGS), f"a command came or went: if that is meant, {WRITE} flags"


@pytest.mark.parametrize("name", FLAGS)
def test_flags(flags, name):
    """Scripts hold these words."""
    assert flags[name] == FLAGS[name], (
        f"`infifpo {name}` has other flags than before. A flag that is renamed keeps its old "
        f"spelling (`hidden_alias`). If the change is meant: CHANGELOG.md, and {WRITE} flags"
    )


@pytest.mark.parametrize("name", FORMATS)
def test_formats(formats, name):
    """Files of today are read tomorrow, or refused in a sentence."""
    now, before = formats[name], FORMATS[name]
    assert now == before, (
        f"{name} is written otherwise than before, as version {now.get('version')} (before: "
        f"{before.get('version')}). Where readers would notice, raise the version in its `Format` "
        "and write a migration, or say in `older` why there is none. Then docs/file-formats.md, "
        f"CHANGELOG.md, and {WRITE} formats"
    )


def test_every_command_is_frozen():
    assert {name.split()[0] for name in FLAGS} == set(COMMANDS)
