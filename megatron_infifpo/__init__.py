"""InfiFPO on Megatron: preference optimization of a pivot model against fused source models."""

__version__ = "0.2.0.dev0"
