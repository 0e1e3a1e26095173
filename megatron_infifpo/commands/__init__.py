"""The subcommands of `infifpo`, one file each."""
