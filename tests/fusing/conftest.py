import pytest

from support.fusing import Models


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("fusing"))
