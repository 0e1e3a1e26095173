"""Reading and writing of documents, in whatever program."""

import runpy

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.patches import cpu
from megatron_infifpo.storage import documents


def test_an_import_raises_and_does_not_exit(monkeypatch):
    """It may be in a notebook, which prints the sentence and goes on."""

    def broken() -> None:
        raise UserError("Transformer Engine does not import")

    monkeypatch.setattr(cpu, "before_megatron", broken)
    with pytest.raises(UserError, match="does not import"):
        runpy.run_path(documents.__file__)
