#!/usr/bin/env python
"""`infifpo import`, `export`, `verify` and `describe`, under their old names."""

from megatron_infifpo.commands.main import run_tool

if __name__ == "__main__":
    run_tool({"import": "import", "export": "export", "verify": "verify", "inspect": "describe"})
