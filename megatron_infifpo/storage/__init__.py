"""Files: Megatron's indexed documents, safetensors, torch_dist checkpoints, checksums."""
