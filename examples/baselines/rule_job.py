"""The commands of one seed: each is run once, and refused if its flags are others by then."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from megatron_infifpo.errors import UserError


class RuleJob:
    """Everything of one seed; its commands write into files, and a bar counts them.

    Attributes:
        folder: of everything.
        records: files of the splits.
        bar: counts commands.
    """

    def __init__(self, folder: Path, splits: list[str], bar: tqdm):
        """Work in a folder."""
        self.folder, self.bar = folder.resolve(), bar
        self.folder.mkdir(parents=True, exist_ok=True)
        self.records = {split: self.folder / f"{split}.jsonl" for split in splits}

    def command(self, *words: object, log: Path) -> None:
        """Run `infifpo WORDS` in one process, on one core."""
        log.parent.mkdir(exist_ok=True)
        quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
        argv = [sys.executable, "-m", "megatron_infifpo", *map(str, words)]
        with open(log, "w", encoding="utf-8") as file:
            env = {**os.environ, **quiet, "OMP_NUM_THREADS": "1"}
            code = subprocess.run(argv, env=env, stdout=file, stderr=file).returncode
        if code:
            raise UserError(f"infifpo {words[0]} failed with exit code {code}; see {log}")

    def infifpo(self, name: str, *words: object) -> Path:
        """Run a command once, `name` says what it makes; return the file of what it prints."""
        stamp, log = self.folder / "commands" / name, self.folder / "logs" / f"{name}.log"
        line = " ".join(str(word) for word in words) + "\n"
        if not stamp.exists():
            self.command(*words, log=log)
            stamp.parent.mkdir(exist_ok=True)
            stamp.write_text(line, encoding="utf-8")
        elif stamp.read_text(encoding="utf-8") != line:
            raise UserError(
                f"{name} in {self.folder} was made with other flags, see {stamp}: choose another "
                "--output, or delete the folder"
            )
        self.bar.update()
        return log

    def sources(self, split: str, initial: str, names: list[str]) -> Path:
        """Write a sources.yaml (JSON is YAML too) and return its path."""
        path = self.folder / "sources" / f"{split}-{initial}-{'-'.join(names)}.yaml"
        entries = [{"name": name, "logprobs": f"../logprobs/{split}-{name}"} for name in names]
        content = {"initial": f"../logprobs/{split}-{initial}", "sources": entries}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path
