"""Transformer Engine with emulated kernels, in processes of its own: one zygote a version."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.launcher import ROOT, Ranks

FOLDER = Path(os.environ.get("INFIFPO_TE", ROOT / ".venv" / "te"))
VERSIONS = ("2.14.0", "2.20.2")  # the oldest that docs/clusters.md recommends, and the newest


@pytest.fixture(scope="session")
def te_zygotes(tmp_path_factory) -> Iterator[Callable[[str], Ranks]]:
    """Ranks of processes that have imported a version of Transformer Engine first of all."""
    started: dict[str, Ranks] = {}

    def get(version: str) -> Ranks:
        folder = FOLDER / version
        if not folder.is_dir():
            pytest.skip(f"no Transformer Engine in {folder}: run tests/gpu/fetch_te.sh .venv")
        if version not in started:
            command = ["-m", "support.te_zygote", str(folder)]
            started[version] = Ranks(tmp_path_factory.mktemp(f"te-{version}"), *command)
        return started[version]

    yield get
    for ranks in started.values():
        ranks.close()


@pytest.fixture(params=VERSIONS)
def te_ranks(request, te_zygotes) -> Ranks:
    """Every version in turn."""
    return te_zygotes(request.param)


@pytest.fixture(scope="session")
def oldest_te_ranks(te_zygotes) -> Ranks:
    """The oldest version, for what differs between them if anything does."""
    return te_zygotes(VERSIONS[0])


@pytest.fixture(scope="session")
def newest_te_ranks(te_zygotes) -> Ranks:
    """The newest version, for what takes longer."""
    return te_zygotes(VERSIONS[-1])
