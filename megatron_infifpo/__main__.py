"""`python -m megatron_infifpo`: the installed command, where it is not on PATH."""

from megatron_infifpo.commands.main import main

if __name__ == "__main__":
    main()
