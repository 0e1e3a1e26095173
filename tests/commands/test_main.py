"""The installed command: its help, its names, what it completes, and old names in tools/."""

import os
import re
import subprocess
import sys
import time

import pytest

from megatron_infifpo import __version__
from megatron_infifpo.commands import entry
from megatron_infifpo.commands.flags import hidden_alias
from megatron_infifpo.commands.help import pages_of
from megatron_infifpo.commands.main import COMMANDS, PAGES, make_parser, run_words
from megatron_infifpo.errors import UserError
from support.launcher import ROOT

# tools/NAME.py -> command
OLD = {
    "evaluate": "evaluate", "gpu_check": "gpu-check", "import_logprobs": "import-logprobs",
    "inspect_preferences": "inspect", "label_responses": "label", "launch": "launch",
    "make_report": "report", "plan_run": "plan", "prepare_preferences": "prepare",
    "sample_responses": "sample", "score_source": "score", "split_preferences": "split",
    "verify_data": "check",
}  # fmt: skip


def infifpo(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `infifpo WORDS` in a process of its own."""
    command = [sys.executable, "-m", "megatron_infifpo", *words]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 12), reason="argparse of Python 3.12 made the pages"
)
@pytest.mark.parametrize("name", COMMANDS)
def test_pages(name):
    """Stored pages are those of the parsers: python -m megatron_infifpo.commands.help."""
    for page, text in pages_of(name).items():
        assert (PAGES / f"{page}.txt").read_text(encoding="utf-8") == text
        assert text.isascii(), "not every terminal can print it"


def test_no_other_pages():
    known = {"infifpo", *COMMANDS}
    inner = {path.stem for path in PAGES.glob("*.txt")} - known
    assert inner == {"import-logprobs-published", "import-logprobs-tokens"}


def test_overview(capsys):
    """Every command is there, with the first line of its page; so are the pages of all of them."""
    assert run_words(["--help"]) == 0
    page = " ".join(capsys.readouterr().out.split()) + " "
    for name in COMMANDS:
        assert run_words([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: infifpo {name} ")
        assert f" {name} {' '.join(text.split(chr(10) * 2)[1].split())} " in page


def test_help_imports_nothing():
    """So it takes well under a second; COLUMNS of the user do not matter."""
    start = time.perf_counter()
    code = "import sys; from megatron_infifpo.commands.main import main\ntry: main()\n"
    code += "finally: print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "score", "--input", "x", "--help"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"COLUMNS": "40"}, capture_output=True, text=True
    )
    assert time.perf_counter() - start < 5  # on a machine with other work to do
    assert not {"torch", "numpy", "transformers", "megatron"} & set(done.stderr.split())
    assert done.stdout == (PAGES / "score.txt").read_text(encoding="utf-8")


def test_another_megatron(monkeypatch, capsys):
    """The page has its flags; with another one installed the parser is asked."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.19.99")
    asked = []
    monkeypatch.setattr(
        "megatron_infifpo.commands.main.run_command", lambda *all: asked.append(all)
    )
    run_words(["train", "--help"])
    assert asked == [("train", ["--help"])]
    run_words(["score", "--help"])
    assert len(asked) == 1 and "usage: infifpo score" in capsys.readouterr().out


def test_a_command_in_a_command(capsys):
    for words, usage in (
        (["import-logprobs", "tokens", "--help"], "usage: infifpo import-logprobs tokens "),
        (["import-logprobs", "--help"], "usage: infifpo import-logprobs [-h]"),
    ):
        run_words(words)
        assert capsys.readouterr().out.startswith(usage)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prepaer"], "there is no command 'prepaer': expected prepare"),
        (["gpu_check"], "there is no command 'gpu_check': expected gpu-check"),
        (["zzz"], "there is no command 'zzz': expected init, show, fuse, status, "),
    ],
)
def test_near_names(words, expected):
    with pytest.raises(UserError, match=expected):
        run_words(words)


def test_without_words():
    done = infifpo()
    assert done.returncode == 2 and done.stderr.startswith("usage: infifpo COMMAND")
    assert infifpo("--version").stdout == f"megatron_infifpo {__version__}\n"
    done = infifpo("nothing")
    assert done.returncode == 2 and done.stderr.startswith("error: there is no command 'nothing'")


@pytest.mark.parametrize(
    ("name", "words", "old", "new"),
    [
        ("sample", "--input x --model m --output o", "--tensor-parallel-size",
         "--tensor-model-parallel-size"),
        ("check", "", "--preference-data", "--data"),
        ("inspect", "--data d --id 1", "--preference-sources", "--sources"),
        ("evaluate", "", "--tensor-parallel-size", "--tensor-model-parallel-size"),
        ("plan", "--model m --gpus 8", "--row-tokens", "--micro-batch-tokens"),
        ("score", "--backend megatron --model m --input i --output o", "--row-tokens",
         "--micro-batch-tokens"),
    ],
)  # fmt: skip
def test_old_spellings(name, words, old, new, capsys):
    _, parser = make_parser(name)
    given = [parser.parse_args([*words.split(), flag, "2"]) for flag in (old, new)]
    assert given[0] == given[1]
    assert old not in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args([*words.split(), old])
    assert f"argument {new}: expected one argument" in capsys.readouterr().err


def test_a_flag_of_two_spellings_is_one_when_it_is_cut_short():
    module, parser = make_parser("sample")
    args = parser.parse_args(["--model", "m", "--input", "p", "--tensor", "2"])
    assert args.tensor_model_parallel_size == 2


@pytest.mark.parametrize("words", ["train --help", "completion bash"])
def test_a_reader_that_goes_away(words):
    command = f"{sys.executable} -m megatron_infifpo {words} | (exec <&-; sleep 1)"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("3", [entry.FIRST_SPEAKS_S])])
def test_the_first_rank_says_why(monkeypatch, capsys, rank, waits):
    """A launcher ends all ranks when it sees one end, so the others leave after the first."""

    def refuse() -> None:
        raise UserError("no such thing")

    slept: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(entry.time, "sleep", slept.append)
    with pytest.raises(SystemExit) as end:
        entry.run(refuse)
    assert end.value.code == 2 and slept == waits
    assert "error: no such thing" in capsys.readouterr().err


def test_an_alias_of_nothing():
    with pytest.raises(KeyError):
        hidden_alias(make_parser("plan")[1], "--old", "--no-such-flag")


@pytest.mark.parametrize("old", OLD)
def test_old_names(old):
    """Files in tools/ are the commands under another name."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{old}.py"), "--help"],
        capture_output=True,
        text=True,
    )
    assert done.stdout == (PAGES / f"{OLD[old]}.txt").read_text(encoding="utf-8"), done.stderr


@pytest.mark.parametrize(("old", "new"), [("import", "import"), ("inspect", "describe")])
def test_old_names_of_the_converter(old, new):
    tool = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
    done = subprocess.run([*tool, old, "--help"], capture_output=True, text=True)
    assert done.stdout == (PAGES / f"{new}.txt").read_text(encoding="utf-8"), done.stderr
    done = subprocess.run([*tool, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "import | export | verify | inspect" in done.stdout
    assert subprocess.run([*tool, "nothing"], capture_output=True).returncode == 2


COMPLETE = """
try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _infifpo; echo "${COMPREPLY[*]}"; }
try infifpo im
try infifpo gpu-check --de
try infifpo gpu-check --device ''
try infifpo gpu-check --json a/b
try infifpo train --preference-so
try infifpo score --backend t
try infifpo import-logprobs ''
try infifpo import-logprobs tokens --mask
try infifpo plan --no-sh
try infifpo nothing --
"""
COMPLETED = """
import import-logprobs
--device
cuda cpu

--preference-sources
transformers
published tokens
--mask-missing
--no-share-prompt

"""


def test_completion_in_bash():
    script = infifpo("completion", "bash").stdout
    done = subprocess.run(["bash", "-c", script + COMPLETE], capture_output=True, text=True)
    assert done.stdout.strip() == COMPLETED.strip(), done.stderr
    zsh = infifpo("completion", "zsh").stdout
    assert zsh == "autoload -U +X bashcompinit && bashcompinit\n" + script
    assert re.search(r"^complete .* infifpo$", script, re.MULTILINE)
