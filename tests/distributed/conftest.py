"""Fixtures of training on real ranks."""

import pytest

from support import tiny


@pytest.fixture(scope="session")
def pivots(setup, ranks, tmp_path_factory):
    """Imported tiny pivots by family, for pairs tokenized with the common tokenizer."""
    folder = tmp_path_factory.mktemp("pivots")
    made = {}

    def get(family: str, seed: int = 4):
        name = f"{family}-{seed}"
        if name not in made:
            hf = tiny.save_model(folder / f"{name}-hf", family, seed=seed)
            argv = ["import", "--hf", str(hf), "--save", str(folder / name)]
            ranks(1, "support.tools:run_tool", "convert_checkpoint", argv)
            made[name] = hf, folder / name
        return made[name]

    return get
