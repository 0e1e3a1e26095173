"""A page about a finished or running training run."""
