"""Training as a module, for launchers that want one: `torchrun ... -m megatron_infifpo.train`."""

from megatron_infifpo.commands.main import run_tool

if __name__ == "__main__":
    run_tool("train")
