"""The paper's models: what of their published config.json files shapes follow from."""

from typing import Any

PUBLISHED: dict[str, dict[str, Any]] = {
    "phi-4": {
        "model_type": "phi3", "hidden_act": "silu", "hidden_size": 5120,
        "intermediate_size": 17920, "max_position_embeddings": 16384, "num_attention_heads": 40,
        "num_hidden_layers": 40, "num_key_value_heads": 10, "rms_norm_eps": 1e-5,
        "rope_theta": 250000, "sliding_window": None, "tie_word_embeddings": False,
        "vocab_size": 100352, "pad_token_id": 100349,
    },
    "qwen2.5-14b": {
        "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 5120,
        "intermediate_size": 13824, "max_position_embeddings": 32768, "max_window_layers": 70,
        "num_attention_heads": 40, "num_hidden_layers": 48, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 152064,
    },
    "qwen2.5-math-7b": {
        "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 4096, "max_window_layers": 28,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 152064,
    },
    "mistral-small-24b": {
        "model_type": "mistral", "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "intermediate_size": 32768, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 100000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "vocab_size": 131072,
    },
    "gemma-3-12b": {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 3840, "intermediate_size": 15360, "model_type": "gemma3_text",
            "num_attention_heads": 16, "num_hidden_layers": 48, "num_key_value_heads": 8,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
    },
}  # fmt: skip
