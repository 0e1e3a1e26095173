"""tools/verify_data.py: good data passes, and every kind of damage is named."""

import json
import shutil

import numpy as np
import pytest

from support.tools import run_tool


@pytest.fixture
def data(setup, tmp_path):
    """A copy of the job's data, to be damaged."""
    for path in setup.folder.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / path.name)
    manifest = json.loads((tmp_path / "train.json").read_text())
    manifest["source_files"] = [str(tmp_path / "train.jsonl")]
    (tmp_path / "train.json").write_text(json.dumps(manifest))
    entries = ["{name: qwen, logprobs: qwen}", "{name: phi, logprobs: phi, domains: [code]}"]
    lines = "\n".join(f"  - {entry}" for entry in entries)
    (tmp_path / "sources.yaml").write_text(f"initial: initial\nsources:\n{lines}\n")
    return tmp_path


@pytest.fixture
def verify(data, capsys):
    """Exit code, and the lines that it prints."""

    def call(*flags: str) -> tuple[int | None, list[str]]:
        argv = ["--data", str(data / "train"), "--sources", str(data / "sources.yaml"), *flags]
        code = run_tool("verify_data", argv)
        return code, capsys.readouterr().out.splitlines()

    return call


def failures(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("FAILED")]


def test_good_data(setup, verify):
    weights = [f"initial={setup.pivot}", f"qwen={setup.folder / 'qwen'}"]
    code, lines = verify("--weights", *weights)
    assert code == 0 and not failures(lines), lines
    assert lines[-1] == "all is as it should be"
    assert len([line for line in lines if line.startswith("ok ")]) == 11
    assert any("20 records, tokenized again" in line for line in lines)
    assert any("qwen, log-probs: 20 records, 0 of them masked" in line for line in lines)


def test_other_weights(setup, verify):
    code, lines = verify("--weights", f"qwen={setup.folder / 'phi'}")
    assert code == 2
    assert ["qwen, weights" in line for line in failures(lines)] == [True]


def change_a_text(data):
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join([lines[0].replace(" yes", " no way"), *lines[1:]]))


def change_a_token(data):
    tokens = np.memmap(data / "train.bin", np.int32, "r+")
    tokens[5] += 1
    tokens.flush()


def change_a_value(data):
    values = np.memmap(data / "qwen.bin", np.float32, "r+")
    values[7] -= 0.25
    values.flush()


def change_a_sum(data):
    sums = np.load(data / "phi_sums.npy")
    sums[3, 1] = np.nan
    np.save(data / "phi_sums.npy", sums)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_a_text, "records: .* the file has changed since"),
        (change_a_token, "tokens in .*record 'train-0' .* has other tokens"),
        (change_a_value, "qwen, log-probs: record 'train-0': .* adds up to"),
        (change_a_sum, "phi, log-probs: .*record 'train-3' has the log-prob nan"),
    ],
)
def test_damage_is_named(data, verify, change, expected):
    import re

    change(data)
    code, lines = verify()
    assert code == 2
    found = failures(lines)
    assert len(found) == 1 and re.search(expected, found[0]), lines


def test_a_run_of_other_data(setup, ranks, data, verify):
    sources = data / "sources.yaml"
    argv = setup.flags(sources, "--save", str(data / "run"), "--save-interval", "3")
    argv[argv.index("--preference-data") + 1] = str(data / "train")
    ranks(1, "support.training:train", argv)
    code, lines = verify("--run", str(data / "run"))
    assert code == 0 and "1 attempts on these data" in lines[-2]
    sources.write_text("initial: initial\nsources: [{name: qwen, logprobs: qwen}]\n")
    code, lines = verify("--run", str(data / "run"))
    assert code == 2 and "data.sources.phi" not in lines[-1]
    assert "sources.phi is missing, but was there" in failures(lines)[0]
