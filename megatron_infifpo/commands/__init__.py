"""The subcommands of `infifpo`, one file each; `main` says what such a file has."""
