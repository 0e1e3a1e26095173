"""Rounds on the policy's own samples: sample, label, score, train, export, again."""
