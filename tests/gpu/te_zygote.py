"""The zygote of tests/zygote.py, with a Transformer Engine imported before everything else.

Usage: te_zygote.py FOLDER, where `fetch_te.sh` has put that version's Python.
"""

import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    import te_emulation

    te_emulation.load(Path(sys.argv[1]))
    import megatron_infifpo.train  # noqa: F401  (readies Megatron for the CPU)
    import te_workers  # noqa: F401  (and with it every model of transformers, before the forks)

    runpy.run_path(str(TESTS / "zygote.py"), run_name="__main__")
