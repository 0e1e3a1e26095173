"""Write docs/models.md, what becomes of which model: python -m megatron_infifpo.families.page."""

from megatron_infifpo.families import FAMILIES

# Model types that people use, with models that have them, and why one is no pivot.
_EXPERTS = "mixture of experts"
_RECURRENT = "recurrent layers"
_LAYER_NORM = "layer norms with biases"
_CAPPED = "soft-capped logits"
_BLOCKS = "attention and MLP side by side"
_IMAGES = "images or sound"
_LATENT = "latent attention"
_POSITIONS = "other positions"
_NOT_YET = "nobody has asked"
TYPES: dict[str, tuple[str, str]] = {
    "afmoe": ("Trinity", _EXPERTS),
    "apertus": ("Apertus", "another activation"),
    "arcee": ("AFM", "another activation"),
    "baichuan": ("Baichuan 2", _NOT_YET),
    "bamba": ("Bamba", _RECURRENT),
    "bitnet": ("BitNet", "weights of two bits"),
    "bloom": ("BLOOM", _LAYER_NORM),
    "chatglm": ("ChatGLM, GLM-4 (first)", _NOT_YET),
    "cohere": ("Command R", _BLOCKS),
    "cohere2": ("Command R7B, Command A", _BLOCKS),
    "dbrx": ("DBRX", _EXPERTS),
    "deepseek_v2": ("DeepSeek-V2", _LATENT),
    "deepseek_v3": ("DeepSeek-V3, R1, Kimi-K2", _LATENT),
    "dots1": ("dots.llm1", _EXPERTS),
    "ernie4_5": ("ERNIE 4.5 0.3B", "neighbouring channels rotated"),
    "ernie4_5_moe": ("ERNIE 4.5", _EXPERTS),
    "exaone4": ("EXAONE 4", "layers without positions"),
    "falcon": ("Falcon", _LAYER_NORM),
    "falcon_h1": ("Falcon-H1", _RECURRENT),
    "falcon_mamba": ("Falcon Mamba", _RECURRENT),
    "gemma": ("Gemma", _NOT_YET),
    "gemma2": ("Gemma 2", _CAPPED),
    "gemma3": ("Gemma 3 4B, 12B, 27B", ""),
    "gemma3_text": ("Gemma 3 270M, 1B", ""),
    "gemma3n": ("Gemma 3n", "layers with streams beside them"),
    "glm": ("GLM-4-9B (-hf)", ""),
    "glm4": ("GLM-4-9B, 32B (0414), GLM-Z1", ""),
    "glm4_moe": ("GLM-4.5, 4.6", _EXPERTS),
    "gpt2": ("GPT-2", _LAYER_NORM),
    "gpt_neox": ("Pythia, GPT-NeoX", _LAYER_NORM),
    "gpt_oss": ("gpt-oss", ""),
    "gptj": ("GPT-J", _LAYER_NORM),
    "granite": ("Granite 3 dense", ""),
    "granitemoe": ("Granite 3 MoE", _EXPERTS),
    "granitemoehybrid": ("Granite 4", _RECURRENT),
    "helium": ("Helium", "neighbouring channels rotated"),
    "hunyuan_v1_dense": ("Hunyuan dense", "norms of heads after the rope"),
    "internlm2": ("InternLM2, 2.5", _NOT_YET),
    "jamba": ("Jamba", _RECURRENT),
    "kimi_linear": ("Kimi-Linear", _RECURRENT),
    "lfm2": ("LFM2", "convolutions"),
    "llama": ("Llama 2, 3.x, SmolLM2, DeepSeek-R1-Distill-Llama, Yi", ""),
    "llama4": ("Llama 4", _EXPERTS),
    "llava": ("LLaVA, Pixtral", _IMAGES),
    "mamba": ("Mamba", _RECURRENT),
    "mamba2": ("Mamba-2, Codestral Mamba", _RECURRENT),
    "minicpm3": ("MiniCPM3", _LATENT),
    "minimax_m2": ("MiniMax-M2", _EXPERTS),
    "ministral": ("Ministral 8B", _NOT_YET),
    "ministral3": ("Ministral 3", "queries scaled by position"),
    "mistral": ("Mistral 7B, Nemo, Small 2409 and 2501", ""),
    "mistral3": ("Mistral-Small 3.1, 3.2", ""),
    "mixtral": ("Mixtral", _EXPERTS),
    "mpt": ("MPT", _POSITIONS),
    "nemotron": ("Nemotron-4, Minitron", "layer norms with biases, another activation"),
    "nemotron_h": ("Nemotron-H, Nemotron Nano 2, 3", _RECURRENT),
    "olmo": ("OLMo", "layer norms"),
    "olmo2": ("OLMo 2", ""),
    "olmo3": ("OLMo 3", ""),
    "olmoe": ("OLMoE", _EXPERTS),
    "opt": ("OPT", _LAYER_NORM),
    "phi": ("Phi-1, 1.5, 2", _LAYER_NORM),
    "phi3": ("Phi-3, 3.5-mini, Phi-4, Phi-4-mini, -reasoning", ""),
    "phi4_multimodal": ("Phi-4-multimodal", _IMAGES),
    "phimoe": ("Phi-3.5-MoE", _EXPERTS),
    "qwen2": ("Qwen2, Qwen2.5, Coder, Math, QwQ, DeepSeek-R1-Distill-Qwen", ""),
    "qwen2_5_vl": ("Qwen2.5-VL", _IMAGES),
    "qwen2_moe": ("Qwen1.5-MoE, Qwen2-57B-A14B", _EXPERTS),
    "qwen3": ("Qwen3 dense", ""),
    "qwen3_5": ("Qwen3.5", _RECURRENT),
    "qwen3_moe": ("Qwen3-30B-A3B, 235B-A22B", _EXPERTS),
    "qwen3_next": ("Qwen3-Next", _RECURRENT),
    "qwen3_vl": ("Qwen3-VL", _IMAGES),
    "seed_oss": ("Seed-OSS", _NOT_YET),
    "smollm3": ("SmolLM3", ""),
    "stablelm": ("StableLM 2", _LAYER_NORM),
    "starcoder2": ("StarCoder2", _LAYER_NORM),
}

_HEADER = """\
# Models

What becomes of a model, by the `model_type` of its config.json. A pivot is imported, trained by
Megatron and exported ([converting.md](converting.md)); a source is scored, by Megatron where it may
be a pivot and else by transformers {version} ([scoring.md](scoring.md)). This page is made by
`python -m megatron_infifpo.families.page`. A field of config.json that would be computed otherwise
is refused by name, in any family; quantized weights can be those of a source
alone, but for gpt-oss, whose four bits are read as the numbers that they are.

{pivots} of these {all} model types may be pivots, and {sources} sources.

| `model_type` | models | pivot | source |
|---|---|---|---|"""
MEGATRON, TRANSFORMERS, OWN_CODE = "Megatron, transformers", "transformers", "with its own code"


def pivot(model_type: str) -> bool:
    """Whether models of a type are imported and trained."""
    return model_type in FAMILIES


def source(model_type: str) -> str | None:
    """Say what scores models of a type; None: nothing does."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if pivot(model_type):
        return MEGATRON
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return TRANSFORMERS
    return None if model_type in CONFIG_MAPPING_NAMES else OWN_CODE


def page() -> str:
    """Return the page."""
    import transformers

    rows = []
    for name in sorted({**TYPES, **dict.fromkeys(FAMILIES)}):
        models, why = TYPES[name]
        taken = "yes" if pivot(name) else f"no: {why}"
        rows.append(f"| `{name}` | {models} | {taken} | {source(name) or 'no'} |")
    pivots = sum(map(pivot, TYPES))
    sources = sum(source(name) is not None for name in TYPES)
    version = transformers.__version__
    head = _HEADER.format(version=version, pivots=pivots, all=len(rows), sources=sources)
    notes = (
        f"`{OWN_CODE}`: transformers has no such models; a folder with Python files of its own is "
        "scored with\n`--trust-remote-code`, if these work with this version of transformers.\n"
    )
    return "\n".join([head, *rows, "", notes])


if __name__ == "__main__":
    print(page(), end="")
