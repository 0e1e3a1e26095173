"""What benchmarks share: jobs to time, and the peers they are timed against."""
