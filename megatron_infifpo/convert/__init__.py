"""Hugging Face checkpoints to Megatron's and back."""
