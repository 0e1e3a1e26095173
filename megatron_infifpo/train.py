"""Training as a module, for launchers that want one: `torchrun ... -m megatron_infifpo.train`."""

from megatron_infifpo.commands.entry import run
from megatron_infifpo.training.run import main

if __name__ == "__main__":
    run(main)
