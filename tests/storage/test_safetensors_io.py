"""Our reader and writer against the safetensors library, and against broken files."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.safetensors_io import SafetensorsFile, SafetensorsWriter

TENSORS = {
    "b.weight": torch.arange(12.0).view(3, 4),
    "a": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "c": torch.arange(5.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bytes_as_the_library(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "ours", shapes, dtype) as writer:
        for name in ("c", "empty", "b.weight", "a"):  # in any order
            writer.write(name, TENSORS[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    file = SafetensorsFile(tmp_path / "theirs")
    for name, tensor in load_file(tmp_path / "theirs").items():
        assert torch.equal(file.read(name), tensor) and file.shapes[name] == tuple(tensor.shape)


def test_an_incomplete_file_is_our_mistake(tmp_path):
    with pytest.raises(AssertionError, match="not written: .*'a'"):
        with SafetensorsWriter(tmp_path / "x", {"a": (2,), "b": (1,)}, torch.float32) as writer:
            writer.write("b", torch.zeros(1))


def write(path, header, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header, data, match",
    [
        ({"a": entry()}, b"\0" * 7, "it has .* bytes, its header says"),
        ({"a": entry()}, b"\0" * 9, "it has .* bytes, its header says"),
        ({"a": entry(shape=(3,))}, b"\0" * 8, "tensor a of shape .* has 8 bytes"),
        ({"a": entry(offsets=(4, 12))}, b"\0" * 12, "begins at byte 4, expected 0"),
        ({"a": entry(), "b": entry()}, b"\0" * 8, "begins at byte 0, expected 8"),
        ({"a": entry(shape=(-2,), offsets=(0, -8))}, b"", "tensor a has the entry"),
        ({"a": entry(shape=(2.0,))}, b"\0" * 8, "tensor a has the entry"),
        ({"a": entry(dtype="F99")}, b"\0" * 8, "tensor a has the entry"),
        ({"a": 3}, b"", "tensor a has the entry 3"),
        ([], b"", "not a JSON object"),
        (b"{", b"", "cannot read"),
        (b"[" * 100_000, b"", "cannot read"),
    ],
)
def test_broken_files_are_refused(tmp_path, header, data, match):
    write(tmp_path / "x", header, data)
    with pytest.raises(UserError, match=match):
        SafetensorsFile(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 8, b"\xff" * 100])
def test_files_that_are_something_else(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match="cannot read"):
        SafetensorsFile(tmp_path / "x")


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_flipped_bytes(tmp_path, data):
    """Whatever a byte is changed to, the file is read or refused; sizes are never believed."""
    path = tmp_path / "x"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        file = SafetensorsFile(path)
        for name, kind in file.dtypes.items():
            if kind in ("F32", "F16", "BF16"):
                assert file.read(name).nbytes <= len(content)
    except UserError:
        pass
