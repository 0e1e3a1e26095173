"""What runs a model: Megatron's with our layers, and transformers'."""
