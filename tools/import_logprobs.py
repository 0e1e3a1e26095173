#!/usr/bin/env python
"""`infifpo import-logprobs`, under its old name."""

from megatron_infifpo.commands.main import run_tool

if __name__ == "__main__":
    run_tool("import-logprobs")
