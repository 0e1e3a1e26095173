"""Shapes of models that are measured, with random weights, and pairs of texts of one length."""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of shapes are wanted without PyTorch
    from megatron_infifpo.records.records import PreferenceRecord

_QWEN2 = {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
# Qwen2.5's; and one that a CPU can take, by which the code is tested.
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": _QWEN2 | {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True, "max_position_embeddings": 32768,
    },
    "7b": _QWEN2 | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "tie_word_embeddings": False, "max_position_embeddings": 32768,
    },
    "tiny": _QWEN2 | {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "tie_word_embeddings": False, "max_position_embeddings": 4096,
    },
}  # fmt: skip
# Tokens of the byte-level tokenizer beside 256 bytes: the special ones, and no merges, so that
# every letter is a token and texts have the length that is wanted.
TOKENS = 256 + 4
AROUND_PROMPT, AROUND_RESPONSE = 3, 1  # special tokens of the chat template


def save_shape(folder: Path, shape: str, layers: int, device: str) -> None:
    """Save a random model of that shape and so many layers, in bfloat16, and its tokenizer.

    Args:
        folder: the Hugging Face folder to write.
        shape: a key of `SHAPES`.
        layers: of the model.
        device: where to draw the weights.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from megatron_infifpo.gpu_check.tiny import save_tokenizer

    values = {k: v for k, v in SHAPES[shape].items() if k != "model_type"}
    config = Qwen2Config(**{**values, "num_hidden_layers": layers})
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    save_tokenizer(folder, TOKENS)


def make_pairs(count: int, prompt: int, response: int) -> "list[PreferenceRecord]":
    """Pairs of random letters whose prompts and responses have exactly so many tokens."""
    from megatron_infifpo.records.records import PreferenceRecord, reply

    rng = random.Random(0)

    def text(tokens: int) -> str:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=tokens))

    return [
        PreferenceRecord(
            str(i),
            "any",
            ({"role": "user", "content": text(prompt - AROUND_PROMPT)},),
            (
                reply(text(response - AROUND_RESPONSE)),
                reply(text(response - AROUND_RESPONSE)),
            ),
        )
        for i in range(count)
    ]
