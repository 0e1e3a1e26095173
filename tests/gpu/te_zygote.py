"""The zygote of tests/zygote.py, with a Transformer Engine imported before everything else.

Usage: te_zygote.py FOLDER, where `fetch_te.sh` has put that version's Python.
"""

import importlib
import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    import te_emulation

    te_emulation.load(Path(sys.argv[1]))
    importlib.import_module("megatron_infifpo.training.run")  # readies Megatron for the CPU
    importlib.import_module("te_workers")  # and with it models of transformers, before the forks
    runpy.run_path(str(TESTS / "zygote.py"), run_name="__main__")
