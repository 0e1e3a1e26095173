"""A run of training: its configuration, start, data, step, resume and failures."""
