"""Write the golden loss curves: losses and norms of gradients of a tiny run of every method.

Eight steps of eight pairs on the CPU, one rank, fp32, fixed seeds; one file a method beside this
script. `test_curves.py` holds every later version to them. Where a change of the numbers is meant,
write them again from the repository's root, and say in the commit why they moved:

    python tests/golden/write_curves.py
"""

import json
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent))

import job_setup  # noqa: E402

from megatron_infifpo.methods import METHODS  # noqa: E402
from support.launcher import Ranks  # noqa: E402

STEPS = 8


def curve(setup: job_setup.Setup, ranks: Ranks, method: str) -> dict[str, list[float]]:
    """Train by a method from the tiny pivot; losses and norms of gradients, by step."""
    sources = setup.sources("golden", *(f"{{name: {n}, logprobs: {n}}}" for n in ("qwen", "phi")))
    steps = ["--train-iters", str(STEPS), "--lr", "2e-4", "--method", method]
    argv = setup.flags(sources, *steps)
    if method == "sft":
        position = argv.index("--preference-sources")
        del argv[position : position + 2]
    (record,) = ranks(1, "support.training:train", argv)
    return {"losses": [step["loss"] for step in record["steps"]], "norms": record["norms"]}


def path_of(method: str) -> Path:
    """Return where a method's curve is kept."""
    return FOLDER / f"{method}.json"


def main() -> None:
    """Write all files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = Ranks(folder / "ranks")
        setup = job_setup.make(folder / "job", ranks)
        for method in METHODS:
            found = curve(setup, ranks, method)
            path_of(method).write_text(json.dumps(found, indent=1) + "\n", encoding="ascii")
            print(f"{method}: {found['losses'][0]:.6f} ... {found['losses'][-1]:.6f}")
        ranks.close()


if __name__ == "__main__":
    main()
