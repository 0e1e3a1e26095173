"""The same work done by this program, by TRL and by Liger: what benchmarks compare."""
