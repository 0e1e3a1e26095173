"""The file of what an engine measured while it sampled: what is written is read, or refused."""

import json

import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.tokens.measured import MeasuredResponse, read_measured, write_measured

LINE = {"id": "a", "prompt_ids": [1, 2], "response_ids": [3], "logprobs": [-0.5], "model": "m"}


def test_what_is_written_is_read(tmp_path):
    """Bit by bit, whatever the names hold; and the same bytes from the same numbers."""
    rng = np.random.default_rng(0)
    given = [
        MeasuredResponse(
            f"p\u2028{i}\ud83d",
            rng.integers(0, 2**31 - 1, 3 + i, dtype=np.int32),
            rng.integers(0, 200_000, 1 + i, dtype=np.int32),
            -rng.exponential(size=1 + i).astype(np.float32),
            "phi é",
            *(("a" * 64, "bfloat16") if i % 2 else ()),
        )
        for i in range(4)
    ]
    path, again = tmp_path / "r.jsonl.measured", tmp_path / "again"
    write_measured(path, given)
    found = read_measured(path)
    for one, other in zip(given, found, strict=True):
        assert (one.id, one.model) == (other.id, other.model)
        assert (one.weights_sha256, one.weights_dtype) == (
            other.weights_sha256,
            other.weights_dtype,
        )
        for name in ("prompt_ids", "response_ids", "logprobs"):
            before, after = getattr(one, name), getattr(other, name)
            assert before.dtype == after.dtype and np.array_equal(before, after)
    write_measured(again, found)
    assert again.read_bytes() == path.read_bytes()


def test_an_older_file(tmp_path):
    """It does not name the weights."""
    path = tmp_path / "measured"
    path.write_text(json.dumps(LINE) + "\n")
    found = read_measured(path)[0]
    assert (found.model, found.weights_sha256, found.weights_dtype) == ("m", None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": [-0.5, -1]}, "2 logprobs of 1 response_ids"),
        ({"logprobs": [float("nan")]}, "a log-prob is not finite"),
        ({"logprobs": None}, "logprobs is no list of numbers"),
        ({"response_ids": []}, "response_ids is no list of numbers, or is empty"),
        ({"response_ids": [1.5]}, "response_ids holds 1.5"),
        ({"response_ids": [True]}, "response_ids holds True"),
        ({"prompt_ids": [-1]}, "a token's id is negative"),
        ({"prompt_ids": [2**31]}, "out of bounds"),
        ({"id": 3}, "id is 3, no text"),
        ({"weights_sha256": 3, "weights_dtype": "float32"}, "weights_sha256 is 3, no text"),
        ({"weights_sha256": "a"}, "weights_sha256 and weights_dtype go together"),
    ],
)
def test_other_lines_are_refused(tmp_path, change, message):
    path = tmp_path / "measured"
    path.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | change) + "\n")
    with pytest.raises(UserError, match=f"measured:2: .*{message}.*expected a line of infifpo"):
        read_measured(path)


@pytest.mark.parametrize("text", ["{", "3", '{"id": "a"}', "", "[" * 10**6])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "measured"
    path.write_text(text)
    with pytest.raises(UserError, match="measured:1: |measured is empty"):
        read_measured(path)
    with pytest.raises(UserError, match="cannot read .*none"):
        read_measured(tmp_path / "none")
