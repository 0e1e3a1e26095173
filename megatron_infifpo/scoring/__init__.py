"""Offline scoring: log-probs of every response under every source model."""
