"""InfiFPO on Megatron: preference optimization of a pivot model against fused source models."""

__version__ = "0.1.0"
