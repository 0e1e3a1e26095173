"""One file says what a run is: run.yaml, its stages, and what makes them anywhere."""
