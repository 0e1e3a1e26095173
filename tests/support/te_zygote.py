"""The zygote of zygote.py, with a Transformer Engine imported before everything else.

Usage: python -m support.te_zygote FOLDER, where `fetch_te.sh` has put that version's Python.
"""

import importlib
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    from support import te_emulation

    te_emulation.load(Path(sys.argv[1]))
    importlib.import_module("megatron_infifpo.training.run")  # readies Megatron for the CPU
    importlib.import_module("support.te_layers")  # before the forks: models of transformers
    # In its place: processes that Megatron spawns import this module again, by its name.
    runpy.run_module("support.zygote", run_name="__main__", alter_sys=True)
