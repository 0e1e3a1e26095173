"""What a run needs of a machine, counted before it starts."""
