"""Model families, layer specs, and the construction and use of Megatron's GPTModel."""
