"""The training step: what Megatron's loop calls for every micro-batch."""
