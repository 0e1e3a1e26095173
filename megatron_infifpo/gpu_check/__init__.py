"""Proofs that the program computes what it should on this machine: `infifpo gpu-check`."""
