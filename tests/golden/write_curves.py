"""Write the golden loss curves: losses and norms of gradients of a tiny run of every method.

Eight steps of eight pairs on the CPU, one rank, fp32, fixed seeds; one file a method beside this
script. `test_curves.py` holds every later version to them. Where a change of the numbers is meant,
write them again from the repository's root, and say in the commit why they moved:

    OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/golden/write_curves.py
"""

import json
import tempfile
from pathlib import Path

from megatron_infifpo.methods import METHODS
from support import job_setup
from support.golden import curve, path_of
from support.launcher import Ranks


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
