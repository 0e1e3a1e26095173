"""Fixtures of training on real ranks."""

import pytest

from support import tiny


@pytest.fixture(scope="session")
def pivots(setup, ranks, tmp_path_factory):
    """Imported tiny pivots by family, for pairs tokenized with the common tokenizer."""
    folder = tmp_path_factory.mktemp("pivots")
    made = {}

    def get(family: str):
        if family not in made:
            hf = tiny.save_model(folder / f"{family}-hf", family, seed=4)
            argv = ["import", "--hf", str(hf), "--save", str(folder / family)]
            ranks(1, "support.tools:run_tool", "convert_checkpoint", argv)
            made[family] = hf, folder / family
        return made[family]

    return get
