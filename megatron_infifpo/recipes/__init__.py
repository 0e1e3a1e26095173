"""A run, stage by stage: the command lines, and nemo-run tasks and experiments made of them."""
