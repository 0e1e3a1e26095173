"""infifpo check of log-probs that were scored with --top-k: every kind of damage is named."""

import re
import shutil

import numpy as np
import pytest

from megatron_infifpo.checks.data import DataJob, check_data
from megatron_infifpo.references.logprob_store import LogprobStore
from support.token_job import K, TokenJob


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return TokenJob(tmp_path_factory.mktemp("top-k"), count=4)


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the job's files, to be damaged; tokenizers stay where they are."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def errors(folder) -> dict[str, str]:
    job = DataJob(
        str(folder / "data"), str(folder / "sources.yaml"), input=[str(folder / "sft.jsonl")]
    )
    return {check.what: check.error for check in check_data(job) if check.error is not None}


def change(path, dtype, place: int, value: float) -> None:
    array = np.memmap(path, dtype, "r+")
    array[place] = value
    array.flush()


def test_good_ones(folder):
    """Here the token itself is among the most probable at two of three tokens, and else is not."""
    assert not errors(folder)
    store = LogprobStore(folder / "a")
    top, values = store.top(0, 0), store.logprobs(0, 0)
    among = abs(top.logps - values[:, None]).min(axis=1) < 2e-3
    assert among.tolist() == [t % 3 > 0 for t in range(len(values))]
    assert len(store.top(0, 1).ids) == 0, "of the chosen response alone"


FLOAT, NAN = np.float16, np.float16(np.nan)
DAMAGES = [
    ("_topk_ids", np.int32, 0, -1, r"token 0: .*a_topk_ids.bin has the ids \[-1, .*of at least 0"),
    ("_topk_ids", np.int32, K, 999, r"token 1: .*_ids.bin has the ids \[999, .* 0 below 2\d\d:"),
    ("_topk_ids", np.int32, K, 7, r"token 1: .*_ids.bin has the ids \[7, .*, expected 78 among th"),
    ("_topk_logps", FLOAT, 1, -0.001, "token 0: .*_logps.bin has the log-probs .*expected falling"),
    ("_topk_logps", FLOAT, K + 1, 0.1, "token 1: .*_logps.bin has the log-probs .*of at most 0"),
    ("_topk_logps", FLOAT, K, NAN, "token 0: .*_logps.bin has the log-probs .*nan., expected fall"),
    ("_topk_logps", FLOAT, K, -0.1, r"token 0: .* whose probabilities sum to 1\.\d+, expected 1"),
    ("_bytes", np.uint16, 2, 1, "token 2: .*a_bytes.bin has 1 bytes, expected 3, as its tokenizer"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "dtype", "place", "value", "expected"), DAMAGES)
def test_damage_is_named(folder, file, dtype, place, value, expected):
    change(folder / f"a{file}.bin", dtype, place, value)
    found = errors(folder)
    assert list(found) == ["a, tokens"]
    assert re.search(f"^record 'q0', 'chosen', {expected}", found["a, tokens"]), found
    assert found["a, tokens"].endswith(f"score it again with --top-k {K}")


def test_an_id_twice(folder):
    ids = np.fromfile(folder / "a_topk_ids.bin", np.int32)
    change(folder / "a_topk_ids.bin", np.int32, 3, ids[1])
    assert re.search("token 0: .*expected each of them once", errors(folder)["a, tokens"])


def test_another_log_prob_of_the_token_itself(folder):
    """The same change in the most probable ones and in the tail, so that they sum to 1 still."""
    logps = np.fromfile(folder / "a_topk_logps.bin", np.float16).reshape(-1, K + 1)
    first, tail = np.exp(logps[1, 0], dtype=float), np.exp(logps[1, K], dtype=float)
    less = first * 0.05
    for place, mass in ((K + 1, first - less), (K + 1 + K, tail + less)):
        change(folder / "a_topk_logps.bin", np.float16, place, np.log(mass))
    value = LogprobStore(folder / "a").logprobs(0, 0)[1]
    stored = np.float16(np.log(first - less))
    expected = f"token 1: .*has {stored:.4f} as log-prob of the token itself, .*has {value:.4f}"
    assert re.search(expected, errors(folder)["a, tokens"])


def test_another_text(folder):
    texts = np.load(folder / "a_texts.npy")
    texts[2, 1]["whole"] += 1
    np.save(folder / "a_texts.npy", texts)
    found = errors(folder)["a, tokens"]
    assert re.search("record 'q2', 'rejected', text 0: .*a_texts.npy has the identity", found)


def test_fewer_tokens_are_named_when_the_files_are_read(folder):
    ids = (folder / "a_topk_ids.bin").read_bytes()
    (folder / "a_topk_ids.bin").write_bytes(ids[:-4])
    assert "a_topk_ids.bin" in errors(folder)["a, tokens"]
