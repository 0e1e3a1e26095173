"""What a torch_dist checkpoint holds beside tensors, read without running any code of it."""

import pickle
from io import BytesIO
from typing import Any

import torch

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.torch_dist import BROKEN_PICKLE, TorchDistCheckpoint

_KEY = "common_state/shard_0_1"  # of an object among the tensors, since Megatron 0.19
_FILE = "common.pt"  # before
_PLAIN = {("argparse", "Namespace"), ("collections", "OrderedDict"), ("builtins", "set")}


class _Unknown:
    """What stands where an object of an unknown class was: it takes whatever is done to it."""

    def __new__(cls, *args: Any, **options: Any) -> "_Unknown":
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


class _PlainUnpickler(pickle.Unpickler):
    """Unpickle numbers, words and their collections; of all else, that there was something."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in _PLAIN else _Unknown

    def persistent_load(self, storage: Any) -> Any:
        return _Unknown()  # of a tensor


def read_arguments(checkpoint: TorchDistCheckpoint) -> dict[str, Any]:
    """Return Megatron's arguments of the training that wrote a checkpoint; empty if it has none.

    Raises:
        UserError: the file is broken.
    """
    path = checkpoint.directory / _FILE
    try:
        stored = path.read_bytes() if path.is_file() else checkpoint.object_bytes(_KEY)
        if stored is None:
            return {}
        archive = torch._C.PyTorchFileReader(BytesIO(stored))  # what torch.save writes
        state = _PlainUnpickler(BytesIO(archive.get_record("data.pkl"))).load()
    except BROKEN_PICKLE as error:
        raise UserError(
            f"cannot read the common state of {checkpoint.directory}: {error!r}"
        ) from error
    (state,) = state if isinstance(state, list) else (state,)
    arguments = state.get("args") if isinstance(state, dict) else None
    return dict(vars(arguments)) if hasattr(arguments, "__dict__") else {}
