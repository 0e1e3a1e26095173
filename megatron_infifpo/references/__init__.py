"""Stored log-probs of models: written, imported, opened, listed in `sources.yaml`."""
