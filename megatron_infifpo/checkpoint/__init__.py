"""Conversion between Hugging Face folders and Megatron torch_dist checkpoints, without a model."""
