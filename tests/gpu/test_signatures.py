"""What is called, and what is replaced, by names and arguments that other packages may change.

Transformer Engine's are bound to its real ones where support/te_layers.py runs it.
"""

import ast
import importlib
import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

# Function -> the arguments that we pass, or that our replacement takes.
MEGATRON = {
    "megatron.core.datasets.utils:compile_helpers": [],
    "megatron.training.initialize:_warmup_jit_function": ["tp_size"],
    "megatron.core.pipeline_parallel.schedules:get_forward_backward_func": [
        "pp_size",
        "vp_size",
        "schedule_pg_collection",
    ],
    "megatron.core.pipeline_parallel.schedules:get_schedule_table": [
        "num_microbatches",
        "num_model_chunks",
        "microbatch_group_size_per_vp_stage",
    ],
    "megatron.core.pipeline_parallel.schedules:_build_default_pg_collection": [],
    "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate_shapes": [
        "self",
        "tensor_send_next",
        "tensor_send_prev",
        "recv_prev",
        "recv_next",
    ],
    "megatron.core.tensor_parallel.random:_get_cuda_rng_state": [
        "device",
        "clone",
        "graph_safe",
    ],
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state": [
        "new_state",
        "device",
        "graph_safe",
    ],
}


@pytest.mark.parametrize("name", MEGATRON)
def test_megatron(name):
    """A replacement of a function that has another name by now would do nothing."""
    module, path = name.split(":")
    # Its source, since another test of this process may have replaced the function.
    found: Any = ast.parse(inspect.getsource(importlib.import_module(module)))
    for part in path.split("."):
        found = next(x for x in found.body if getattr(x, "name", None) == part)
    parameters = found.args
    names = [x.arg for x in (*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs)]
    names += [x.arg for x in (parameters.vararg, parameters.kwarg) if x is not None]
    assert names == MEGATRON[name]


def test_where_the_schedule_is_taken_from():
    """Which patches/training_loop.py replaces."""
    assert hasattr(
        importlib.import_module("megatron.training.training"), "get_forward_backward_func"
    )


def test_megatrons_flag_of_apex():
    """Which patches/output_layer.py sets."""
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    assert isinstance(layers._grad_accum_fusion_available, bool)


def test_varlen_attention():
    """As `PackedAttention` calls it; 2.11 had no enable_gqa."""
    parameters = inspect.signature(varlen.varlen_attn).parameters
    given = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert list(parameters)[: len(given)] == given
    for name, default in (("scale", None), ("window_size", (-1, -1)), ("enable_gqa", False)):
        assert parameters[name].default == default
    assert parameters["return_aux"].default is None  # then it returns one tensor


@pytest.mark.parametrize(
    ("name", "overload"), [("mm", "dtype_out"), ("addmm", "dtype_out"), ("mm", "out")]
)
def test_products(name, overload):
    """The head's: in float32 out of halves, into a buffer."""
    schema = getattr(getattr(torch.ops.aten, name), overload)._schema
    names = {argument.name for argument in schema.arguments}
    assert {"self", "mat2", "out"} <= names
    assert ("out_dtype" in names) == overload.startswith("dtype")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    operator = f"aten::{name}.{overload}"
    assert has(operator, "CPU") == (overload == "out")  # why the head has a branch
    if torch.version.cuda:
        assert has(operator, "CUDA")


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built without CUDA")
@pytest.mark.parametrize("operator", ["_flash_attention_forward", "_flash_attention_backward"])
def test_flash_kernels_are_built(operator):
    """What varlen_attn ends in."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "CUDA")
