"""Where Megatron is changed: each file says why, for which version, and what makes it needless."""
