"""What forked ranks run where Transformer Engine's Python has been imported."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support import tiny
from support.tools import run_tool

Model = Any  # Megatron's, whose types are not known here


def as_on_a_gpu() -> None:
    """Fuse what a GPU would: the CPU's own arguments leave out what is compiled for CUDA."""
    from megatron_infifpo.patches import cpu

    needed = ("distributed_backend", "use_cpu_initialization", "num_workers")
    overrides = {name: cpu.argument_overrides()[name] for name in needed}
    cpu.argument_overrides = lambda: overrides


def force_kind(name: str) -> None:
    """Use a kind of layers, whatever the data type: only float32 shows small differences."""
    import megatron_infifpo.engine.gpt as gpt
    from megatron_infifpo.engine.layer_kind import KINDS

    gpt.choose_kind = lambda **_: KINDS[name]


def build(hf: str, kind: str, bf16: bool = False) -> Model:
    """Build and fill a model, to be trained."""
    from megatron_infifpo.convert.hf_weights import load_into_model
    from megatron_infifpo.engine.gpt import build_model
    from megatron_infifpo.engine.parallel import ModelLayout
    from megatron_infifpo.families import megatron_args
    from megatron_infifpo.families.architecture import read_hf_config

    force_kind(kind)
    layout = ModelLayout(bf16=bf16)
    (model,) = build_model(megatron_args(read_hf_config(hf)), layout)
    load_into_model([model], hf)
    return model.train().requires_grad_(True)


def row_of(seed: int, vocab_size: int, *, shared: bool, multiple: int = 16) -> dict[str, Any]:
    """A padded row of three pairs of unequal lengths, one response of a single token."""
    from megatron_infifpo.rows.layout import RowLayout
    from megatron_infifpo.rows.packing import collate
    from megatron_infifpo.rows.preference_dataset import PreferencePair

    rng = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return rng.integers(0, vocab_size, length)

    lengths = [(9, 24, 31 + seed), (30, 1, 12), (2, 17, 5)]  # prompt, chosen, rejected
    pairs = [
        PreferencePair(i, ids(prompt), (ids(chosen), ids(rejected)))
        for i, (prompt, chosen, rejected) in enumerate(lengths)
    ]
    return collate(pairs, RowLayout(multiple, share_prompt=shared))


def by_place(model: Model) -> dict[tuple, Tensor]:
    """A model's parameters, copied, by where a checkpoint has them: key and offsets."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    return {
        (value.key, value.global_offset): value.data.detach().clone()
        for value in nested_values(state)
        if isinstance(value, ShardedTensor)
    }


def results(model: Model, row: dict[str, Any], vocab_size: int) -> tuple[Tensor, dict]:
    """Log-probs of a row, and the gradients of their weighted sum by place in a checkpoint."""
    from megatron_infifpo.engine.packed import run_packed

    logprobs = run_packed(model, row, vocab_size)
    weights = torch.linspace(-1.0, 1.5, len(logprobs))
    model.zero_grad()
    (logprobs * weights).sum().backward()
    with torch.no_grad():  # places are of parameters: let these be their gradients
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return logprobs.detach(), by_place(model)


def family(folder: str, name: str) -> dict[str, Any]:
    """Compare a family's Transformer Engine layers with local ones.

    Returns:
        differences: by kind, and whether prompts are shared: the largest one of log-probs and,
            relative to its largest entry, of any tensor's gradient, to local layers without.
        calls: by the same, how often each emulated kernel ran.
        parameters: names that only one of both Transformer Engine kinds has.
        keys: by kind, names in checkpoints that local layers alone have, or lack.
        gradients: how many tensors were compared.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from support import te_emulation

    as_on_a_gpu()
    hf = str(tiny.save_model(Path(folder) / name, name, seed=5))
    vocab = 320
    rows = {shared: row_of(3, vocab, shared=shared) for shared in (False, True)}
    runs = [(kind, shared) for kind in ("local", "te") for shared in (False, True)]
    found, keys, names, calls = {}, {}, {}, {}
    for kind, shared in [*runs, ("te-attention", False)]:
        model = build(hf, kind)
        names[kind] = [parameter for parameter, _ in model.named_parameters()]
        keys[kind] = {value.key for value in nested_values(model.sharded_state_dict())}
        te_emulation.CALLS.clear()
        found[kind, shared] = results(model, rows[shared], vocab)
        calls[kind, shared] = dict(te_emulation.CALLS)
    base = found["local", False]
    return {
        "differences": {run: _differ(base, got) for run, got in found.items()},
        "calls": calls,
        "parameters": set(names["te"]) ^ set(names["te-attention"]),
        "keys": {kind: keys["local"] ^ other for kind, other in keys.items()},
        "gradients": len(base[1]),
    }


def keys(folder: str, name: str, kind: str) -> dict[str, list[int]]:
    """Return what a kind of layers saves: tensors with their shapes, extra states with shards."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    as_on_a_gpu()
    model = build(str(tiny.save_model(Path(folder) / "hf", name, vocab_size=256, seed=8)), kind)
    state = model.sharded_state_dict()
    apply_factories(state)
    return {value.key: list(value.global_shape) for value in nested_values(state)}


def reload(folder: str, name: str) -> dict[str, list]:
    """Load checkpoints of every origin into every kind of layers.

    Origins: imported, saved by a kind, and saved by local layers before their norms had an extra
    state.

    Returns:
        By origin and kind, the places whose weights differ in any bit, or that were not loaded.
    """
    from megatron.core import dist_checkpointing

    from megatron_infifpo.engine.older import accept_older
    from megatron_infifpo.storage.checkpoints import find_checkpoint
    from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint

    root = Path(folder)
    hf = str(tiny.save_model(root / "hf", name, seed=6))
    run_tool("convert_checkpoint", ["import", "--hf", hf, "--save", f"{root}/imported"])
    origins = {"imported": find_checkpoint(root / "imported")}
    kinds = ("local", "te")
    for origin in (*kinds, "old local"):
        state = build(hf, origin.split()[-1]).sharded_state_dict()
        if origin == "old local":
            state = {k: v for k, v in state.items() if not k.endswith("norm._extra_state")}
        origins[origin] = root / origin
        origins[origin].mkdir()
        dist_checkpointing.save({"model": state}, str(origins[origin]))
    expected, different = by_place(build(hf, "local")), {}
    for origin, checkpoint in origins.items():
        for kind in kinds:
            model = build(hf, kind)
            for parameter in model.parameters():
                parameter.data.fill_(torch.nan)
            accept_older(TorchDistCheckpoint(checkpoint), [model])
            state = {"model": model.sharded_state_dict()}
            model.load_state_dict(dist_checkpointing.load(state, str(checkpoint))["model"])
            got = by_place(model)
            different[f"{origin} to {kind}"] = sorted(
                str(place)
                for place in expected.keys() | got.keys()
                if not torch.equal(expected[place], got[place])
            )
    return different


def _differ(one: tuple[Tensor, dict], other: tuple[Tensor, dict]) -> tuple[float, float]:
    assert one[1].keys() == other[1].keys()
    relative = [
        float((value - other[1][place]).abs().max() / value.abs().max())
        for place, value in one[1].items()
    ]
    return float((one[0] - other[0]).abs().max()), max(relative)


def on_meta(folder: str, name: str) -> dict[str, tuple]:
    """Run whole models forward and backward on `meta`, by CUDA's rules and without a wait.

    Returns:
        By kind of layers and data type, the device and type of log-probs, and those of gradients.
    """
    from transformer_engine.pytorch.ops import RMSNorm

    from megatron_infifpo.engine.packed import run_packed, to_device
    from support.device_rules import CudaMeansMeta, CudaRules, NoConstants

    as_on_a_gpu()
    RMSNorm.pre_first_fuser_forward = lambda self: None  # it would leave `meta` for CUDA
    hf, found = str(tiny.save_model(Path(folder) / "hf", name, seed=7)), {}
    for kind, bf16 in (("local", True), ("local", False), ("te", True)):
        model = build(hf, kind, bf16=bf16)
        with CudaMeansMeta():
            model.to("meta")
            first, second = (to_device(row_of(3, 320, shared=shared)) for shared in (False, True))
            run_packed(model, first, 320)  # constants of the model go to the device once
            with CudaRules(), NoConstants():
                logprobs = run_packed(model, second, 320)
                logprobs.sum().backward()
        gradients = {(p.grad.device.type, str(p.grad.dtype)) for p in model.parameters()}
        found[f"{kind} {'bf16' if bf16 else 'fp32'}"] = (logprobs.device.type, gradients)
    return found


def fp8_rows(recipe: str, tensor_parallel: int) -> dict[str, bool]:
    """Ask Transformer Engine whether it multiplies our rows in FP8, forward and backward."""
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
    from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec

    from megatron_infifpo.engine.layer_kind import KINDS

    found = {}
    padded = KINDS["te"].row_layout(tensor_parallel, fp8_recipe=recipe).multiple
    for name, multiple in (("padded", padded), ("not padded", 1)):
        rows = [row_of(seed, 320, shared=False, multiple=multiple) for seed in range(3)]
        taken = []
        for tokens in (row["tokens"].numel() // tensor_parallel for row in rows):
            # Gradients of weights sum over tokens: there they are the last dimension.
            for tensor in (torch.empty(tokens, 1, 64), torch.empty(64, tokens)):
                try:
                    assert_dim_for_fp8_exec(tensor)
                except ValueError:
                    taken.append(False)
                else:
                    scales = MXFP8Quantizer.is_quantizable(None, tensor)
                    taken.append(recipe != "mxfp8" or scales)
        found[name] = all(taken)
    return found


def score(checkpoint: str, kind: str | None) -> tuple[str, Tensor]:
    """Log-probs of a row by the scorer's backend: float32 on a kind of layers, else as it is.

    Returns:
        The kind of layers, and the log-probs.
    """
    from megatron.core.utils import get_model_config

    from megatron_infifpo.scoring.megatron_backend import MegatronBackend

    as_on_a_gpu()
    if kind is not None:
        force_kind(kind)
    backend = MegatronBackend(checkpoint, bf16=kind is None)
    (logprobs,) = backend([row_of(3, 300, shared=False)])
    return get_model_config(backend.models[0]).layer_kind.name, logprobs
