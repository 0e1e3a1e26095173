"""Proofs that the program computes what it should on this machine: `tools/gpu_check.py`."""
