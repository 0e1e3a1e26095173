"""The demo of rounds: its command line, its judge, its small models."""

import importlib.util
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
from transformers import AutoTokenizer

from megatron_infifpo.commands.main import run_words
from support.launcher import ROOT

FOLDER = ROOT / "examples" / "rounds"


def load(name: str) -> ModuleType:
    """Import a file of the example under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"rounds_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass asks for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", ["fuserlhf", "infifpo", "pad"])
def test_command_line(monkeypatch, tmp_path, capsys, method):
    """What it starts can be read, down to the flags of every stage."""
    example, started = load("run"), []
    monkeypatch.setattr(
        example.specialists, "at_once", lambda save, names, at: {name: at / name for name in names}
    )

    def start(words: list[str], env: dict[str, str]) -> SimpleNamespace:
        started.append(words)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(example, "subprocess", SimpleNamespace(run=start))
    words = ["run", "--output", str(tmp_path), "--method", method, "--keep-rounds", "1"]
    monkeypatch.setattr(sys, "argv", words)
    assert example.main() == 0
    assert run_words([*started[0][3:], "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert [printed.count(f"infifpo {name} ") for name in ("sample", "train")] == [3, 3]
    assert printed.count("infifpo label ") == (0 if method == "pad" else 3)
    assert printed.count("--name source ") == 3


def test_judge():
    judge = load("judge").brief
    assert judge(None, "Paris.") == 1.0 and judge(None, "it is Paris") == 0.5
    assert judge(None, "A " + "word " * 17) == 0.5 and judge(None, "A " + "b " * 50) == 0.0


def test_a_small_model(tmp_path, monkeypatch):
    """It can be sampled from: its template ends every turn with its end of turn."""
    example = load("run")
    for name, small in example.MODELS.items():
        monkeypatch.setitem(example.MODELS, name, replace(small, steps=1))
        tokenizer = AutoTokenizer.from_pretrained(example.save(name, tmp_path))
        end = small.special_tokens["eos"]
        chat = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert text.count(end) == 2 and text.endswith(f"Yes.{end}")
        opened = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        assert text.startswith(opened) and tokenizer.eos_token == end
        assert len(tokenizer) == small.vocab_size
