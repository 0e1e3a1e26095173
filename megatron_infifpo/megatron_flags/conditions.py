"""What must be true beside the class of a flag: values that work, flags that go together."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_infifpo.megatron_flags.group import INFERENCE, OPTIMIZER
from megatron_infifpo.patches import cpu

HAVE_FLASH = importlib.util.find_spec("flash_attn") is not None
HAVE_NVML = importlib.util.find_spec("pynvml") is not None

Flags = Mapping[str, Any]  # by name, as parsed
Test = Callable[[Flags], bool]

# Flags of which only some values work: the values, and why the others do not.
CHOICES: dict[str, tuple[str, str]] = {
    "transformer_impl": ("transformer_engine local", INFERENCE),
    "optimizer": ("adam sgd", OPTIMIZER),
    "ckpt_format": ("torch_dist", "other formats are for other trainings, or not safe to load"),
    "recompute_modules": (
        "core_attn mlp moe shared_experts",
        "Megatron throws the output of such a part away, for which it needs Transformer Engine and "
        "compiles C++ while it trains",
    ),
    "attention_backend": ("flash fused unfused auto", "it is for --spec local"),
    "fp8_recipe": ("delayed tensorwise blockwise mxfp8", "it is code of your own"),
    "rerun_mode": ("validate_results disabled", "Megatron fails on its own name for it"),
    "dist_ckpt_strictness": (
        "assume_ok_unexpected log_unexpected log_all raise_unexpected raise_all",
        "a checkpoint would load in part, or Megatron fail on the answer",
    ),
}


@dataclass(frozen=True)
class Need:
    """Flags that have no effect alone: `names` need that `holds`, which is what `what` says."""

    names: str
    what: str
    holds: Test


@dataclass(frozen=True)
class Conflict:
    """A combination that cannot work, and how to mend it."""

    holds: Test
    message: str


def _selective(flags: Flags) -> bool:
    given, shared = flags["recompute_granularity"], flags["context_parallel_size"] > 1
    by_default = shared and given is None
    return bool(flags["recompute_activations"] or given == "selective" or by_default)


def _interleaved(flags: Flags) -> bool:
    return any(
        value is not None
        for value in (
            flags["num_virtual_stages_per_pipeline_rank"],
            flags["num_layers_per_virtual_pipeline_stage"],
            flags["pipeline_model_parallel_layout"],
        )
    )


NEEDS: tuple[Need, ...] = (
    Need("recompute_modules", "--recompute-granularity selective", _selective),
    Need(
        "recompute_method recompute_num_layers distribute_saved_activations",
        "--recompute-granularity full",
        lambda flags: flags["recompute_granularity"] == "full",
    ),
    Need(
        "overlap_p2p_comm overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage "
        "align_param_gather",
        "interleaved stages (--num-virtual-stages-per-pipeline-rank)",
        _interleaved,
    ),
    Need(
        "clone_scatter_output_in_embedding",
        "--sequence-parallel",
        lambda flags: flags["sequence_parallel"],
    ),
    Need("sgd_momentum", "--optimizer sgd", lambda flags: flags["optimizer"] == "sgd"),
    Need(
        "adam_beta1 adam_beta2 adam_eps",
        "--optimizer adam",
        lambda flags: flags["optimizer"] == "adam",
    ),
    Need(
        "lr_wsd_decay_style lr_wsd_decay_iters lr_wsd_decay_samples",
        "--lr-decay-style WSD",
        lambda flags: flags["lr_decay_style"] == "WSD",
    ),
    Need("decoupled_min_lr", "--decoupled-lr", lambda flags: flags["decoupled_lr"] is not None),
    Need("loss_scale", "--fp16", lambda flags: flags["fp16"]),
    Need(
        "initial_loss_scale min_loss_scale loss_scale_window hysteresis",
        "--fp16, or with --loss-scale",
        lambda flags: flags["fp16"] and flags["loss_scale"] is None,
    ),
    Need("grad_reduce_in_bf16", "--bf16", lambda flags: flags["bf16"]),
    Need(
        "accumulate_allreduce_grads_in_fp32",
        "--bf16 or --fp16",
        lambda flags: flags["bf16"] or flags["fp16"],
    ),
    Need(
        "ddp_num_buckets ddp_bucket_size align_grad_reduce",
        "--overlap-grad-reduce",
        lambda flags: flags["overlap_grad_reduce"],
    ),
    Need(
        "ddp_pad_buckets_for_high_nccl_busbw ddp_reduce_scatter_with_fp32_accumulation "
        "dist_ckpt_optim_fully_reshardable",
        "--use-distributed-optimizer",
        lambda flags: flags["use_distributed_optimizer"],
    ),
    Need(
        "distrib_optim_fully_reshardable_mem_efficient",
        "--dist-ckpt-optim-fully-reshardable",
        lambda flags: flags["dist_ckpt_optim_fully_reshardable"],
    ),
    Need(
        "async_save",
        "--use-persistent-ckpt-worker",
        lambda flags: flags["use_persistent_ckpt_worker"],
    ),
    Need(
        "async_strategy use_persistent_ckpt_worker async_ckpt_cpu_priority async_ckpt_io_priority",
        "--async-save",
        lambda flags: flags["async_save"],
    ),
    Need(
        "save_params_interval save_wgrads_interval save_retain_interval log_progress",
        "--save",
        lambda flags: flags["save"] is not None,
    ),
    Need("manual_gc_interval manual_gc_eval", "--manual-gc", lambda flags: flags["manual_gc"]),
    Need("exit_signal", "--exit-signal-handler", lambda flags: flags["exit_signal_handler"]),
    Need(
        "use_pytorch_profiler profile_step_start profile_step_end profile_ranks nvtx_ranges",
        "--profile",
        lambda flags: flags["profile"],
    ),
    Need(
        "pytorch_profiler_collect_shapes pytorch_profiler_collect_callstack "
        "pytorch_profiler_collect_chakra",
        "--use-pytorch-profiler",
        lambda flags: flags["use_pytorch_profiler"],
    ),
    Need(
        "record_shapes",
        "--profile, or with --use-pytorch-profiler",
        lambda flags: flags["profile"] and not flags["use_pytorch_profiler"],
    ),
    Need(
        "memory_snapshot_path",
        "--record-memory-history",
        lambda flags: flags["record_memory_history"],
    ),
    Need(
        "wandb_exp_name wandb_save_dir wandb_entity",
        "--wandb-project",
        lambda flags: bool(flags["wandb_project"]),
    ),
    Need(
        "flight_recorder_trace_buffer_size flight_recorder_dump_on_timeout "
        "flight_recorder_include_stack_trace flight_recorder_include_only_active "
        "flight_recorder_extra_dump_on_exec",
        "--flight-recorder-dump-path",
        lambda flags: flags["flight_recorder_dump_path"] is not None,
    ),
    Need(
        "eval_interval start_eval_at_iter skip_train",
        "--preference-valid-data",
        lambda flags: flags.get("preference_valid_data") is not None,
    ),
    Need(
        "attention_backend flash_attention_version",
        "--te-attention",
        lambda flags: bool(flags.get("te_attention")),
    ),
    Need(
        "fp8_recipe fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad "
        "first_last_layers_bf16",
        "--fp8-format",
        lambda flags: flags["fp8"] is not None,
    ),
    Need(
        "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16",
        "--first-last-layers-bf16",
        lambda flags: flags["first_last_layers_bf16"],
    ),
    Need(
        "main_grads_dtype",
        "--use-precision-aware-optimizer",
        lambda flags: flags["use_precision_aware_optimizer"],
    ),
    Need(
        "main_params_dtype exp_avg_dtype exp_avg_sq_dtype",
        "--use-precision-aware-optimizer, or with --optimizer-cpu-offload",
        lambda flags: flags["use_precision_aware_optimizer"] and not flags["optimizer_cpu_offload"],
    ),
    Need(
        "optimizer_offload_fraction overlap_cpu_optimizer_d2h_h2d pin_cpu_grads",
        "--optimizer-cpu-offload",
        lambda flags: flags["optimizer_cpu_offload"],
    ),
    Need(
        "optimizer_cpu_offload",
        "--optimizer-offload-fraction above 0",
        lambda flags: flags["optimizer_offload_fraction"] > 0,
    ),
    Need("use_precision_aware_optimizer", "Transformer Engine installed", lambda flags: HAVE_TE),
    Need("flash_attention_version", "the package flash-attn", lambda flags: HAVE_FLASH),
    Need("log_device_memory_used log_energy", "nvidia-ml-py installed", lambda flags: HAVE_NVML),
)

CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        lambda flags: flags["optimizer"] == "sgd" and flags["use_distributed_optimizer"],
        "--optimizer sgd does not go with --use-distributed-optimizer, which keeps Adam's state: "
        "leave one of them out",
    ),
    Conflict(
        lambda flags: flags["optimizer_cpu_offload"] and not flags["use_precision_aware_optimizer"],
        "--optimizer-cpu-offload needs --use-precision-aware-optimizer",
    ),
    Conflict(
        lambda flags: flags["optimizer_cpu_offload"] and not (flags["bf16"] or flags["fp16"]),
        "--optimizer-cpu-offload needs --bf16 or --fp16: Megatron fails on float32 parameters",
    ),
    Conflict(
        lambda flags: (
            flags["lr_decay_style"] == "WSD"
            and flags["lr_wsd_decay_iters"] is None
            and flags["lr_wsd_decay_samples"] is None
        ),
        "--lr-decay-style WSD needs to know when to decay: give --lr-wsd-decay-iters, or "
        "--lr-wsd-decay-samples with --train-samples",
    ),
    Conflict(
        lambda flags: (
            flags["recompute_granularity"] == "full"
            and None in (flags["recompute_method"], flags["recompute_num_layers"])
        ),
        "--recompute-granularity full needs --recompute-method and --recompute-num-layers",
    ),
    Conflict(
        lambda flags: flags["distribute_saved_activations"] and flags["sequence_parallel"],
        "--distribute-saved-activations does not go with --sequence-parallel, which has split them "
        "already: leave it out",
    ),
    Conflict(
        lambda flags: flags["mlp_chunks_for_training"] > 1 and flags["fp8"] is not None,
        "--mlp-chunks-for-training does not go with --fp8-format: parts of a row do not have the "
        "multiples of tokens that FP8 takes; leave one of them out",
    ),
    Conflict(
        lambda flags: flags["async_save"] and flags["async_strategy"] == "nvrx",
        "--async-save writes through nvidia-resiliency-ext by default, which has not been seen to "
        "work here: pass --async-strategy mcore",
    ),
    Conflict(
        lambda flags: flags["use_pytorch_profiler"] and flags["tensorboard_dir"] is None,
        "--use-pytorch-profiler writes beside --tensorboard-dir: give one",
    ),
    Conflict(
        lambda flags: flags["profile"] and not flags["use_pytorch_profiler"] and cpu.is_enabled(),
        "--profile alone is for Nsight Systems, on GPUs: add --use-pytorch-profiler",
    ),
)
