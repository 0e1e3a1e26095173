"""What must be true beside the class of a flag: values that work, flags that go together."""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_infifpo.megatron_flags.group import INFERENCE, OPTIMIZER
from megatron_infifpo.patches import cpu

HAVE_FLASH = importlib.util.find_spec("flash_attn") is not None
HAVE_NVML = importlib.util.find_spec("pynvml") is not None

Test = Callable[[argparse.Namespace], bool]

# Flags of which only some values work: the values, and why the others do not.
CHOICES: dict[str, tuple[str, str]] = {
    "transformer_impl": ("transformer_engine local", INFERENCE),
    "optimizer": ("adam sgd", OPTIMIZER),
    "ckpt_format": ("torch_dist", "other formats are for other trainings, or not safe to load"),
    "recompute_modules": ("core_attn mlp", "layers of converted models have no such part"),
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


def _selective(args: argparse.Namespace) -> bool:
    return bool(args.recompute_activations or args.recompute_granularity == "selective")


def _interleaved(args: argparse.Namespace) -> bool:
    return any(
        value is not None
        for value in (
            args.num_virtual_stages_per_pipeline_rank,
            args.num_layers_per_virtual_pipeline_stage,
            args.pipeline_model_parallel_layout,
        )
    )


NEEDS: tuple[Need, ...] = (
    Need("recompute_modules", "--recompute-granularity selective", _selective),
    Need(
        "recompute_method recompute_num_layers distribute_saved_activations",
        "--recompute-granularity full",
        lambda args: args.recompute_granularity == "full",
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
        lambda args: args.sequence_parallel,
    ),
    Need("sgd_momentum", "--optimizer sgd", lambda args: args.optimizer == "sgd"),
    Need("adam_beta1 adam_beta2 adam_eps", "--optimizer adam", lambda a: a.optimizer == "adam"),
    Need(
        "lr_wsd_decay_style lr_wsd_decay_iters lr_wsd_decay_samples",
        "--lr-decay-style WSD",
        lambda args: args.lr_decay_style == "WSD",
    ),
    Need("decoupled_min_lr", "--decoupled-lr", lambda args: args.decoupled_lr is not None),
    Need("loss_scale", "--fp16", lambda args: args.fp16),
    Need(
        "initial_loss_scale min_loss_scale loss_scale_window hysteresis",
        "--fp16, or with --loss-scale",
        lambda args: args.fp16 and args.loss_scale is None,
    ),
    Need("grad_reduce_in_bf16", "--bf16", lambda args: args.bf16),
    Need(
        "accumulate_allreduce_grads_in_fp32",
        "--bf16 or --fp16",
        lambda args: args.bf16 or args.fp16,
    ),
    Need(
        "ddp_num_buckets ddp_bucket_size align_grad_reduce",
        "--overlap-grad-reduce",
        lambda args: args.overlap_grad_reduce,
    ),
    Need(
        "ddp_pad_buckets_for_high_nccl_busbw ddp_reduce_scatter_with_fp32_accumulation "
        "dist_ckpt_optim_fully_reshardable",
        "--use-distributed-optimizer",
        lambda args: args.use_distributed_optimizer,
    ),
    Need(
        "distrib_optim_fully_reshardable_mem_efficient",
        "--dist-ckpt-optim-fully-reshardable",
        lambda args: args.dist_ckpt_optim_fully_reshardable,
    ),
    Need("async_save", "--use-persistent-ckpt-worker", lambda a: a.use_persistent_ckpt_worker),
    Need(
        "async_strategy use_persistent_ckpt_worker async_ckpt_cpu_priority async_ckpt_io_priority",
        "--async-save",
        lambda args: args.async_save,
    ),
    Need(
        "save_params_interval save_wgrads_interval save_retain_interval log_progress",
        "--save",
        lambda args: args.save is not None,
    ),
    Need("manual_gc_interval manual_gc_eval", "--manual-gc", lambda args: args.manual_gc),
    Need("exit_signal", "--exit-signal-handler", lambda args: args.exit_signal_handler),
    Need(
        "use_pytorch_profiler profile_step_start profile_step_end profile_ranks nvtx_ranges",
        "--profile",
        lambda args: args.profile,
    ),
    Need(
        "pytorch_profiler_collect_shapes pytorch_profiler_collect_callstack "
        "pytorch_profiler_collect_chakra",
        "--use-pytorch-profiler",
        lambda args: args.use_pytorch_profiler,
    ),
    Need(
        "record_shapes",
        "--profile, or with --use-pytorch-profiler",
        lambda args: args.profile and not args.use_pytorch_profiler,
    ),
    Need(
        "memory_snapshot_path",
        "--record-memory-history",
        lambda args: args.record_memory_history,
    ),
    Need(
        "wandb_exp_name wandb_save_dir wandb_entity",
        "--wandb-project",
        lambda args: bool(args.wandb_project),
    ),
    Need(
        "flight_recorder_trace_buffer_size flight_recorder_dump_on_timeout "
        "flight_recorder_include_stack_trace flight_recorder_include_only_active "
        "flight_recorder_extra_dump_on_exec",
        "--flight-recorder-dump-path",
        lambda args: args.flight_recorder_dump_path is not None,
    ),
    Need(
        "eval_interval start_eval_at_iter skip_train",
        "--preference-valid-data",
        lambda args: getattr(args, "preference_valid_data", None) is not None,
    ),
    Need(
        "attention_backend flash_attention_version",
        "--te-attention",
        lambda args: getattr(args, "te_attention", False),
    ),
    Need(
        "fp8_recipe fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad "
        "first_last_layers_bf16",
        "--fp8-format",
        lambda args: args.fp8 is not None,
    ),
    Need(
        "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16",
        "--first-last-layers-bf16",
        lambda args: args.first_last_layers_bf16,
    ),
    Need(
        "main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype",
        "--use-precision-aware-optimizer",
        lambda args: args.use_precision_aware_optimizer,
    ),
    Need("use_precision_aware_optimizer", "Transformer Engine installed", lambda args: HAVE_TE),
    Need("flash_attention_version", "the package flash-attn", lambda args: HAVE_FLASH),
    Need("log_device_memory_used log_energy", "nvidia-ml-py installed", lambda args: HAVE_NVML),
)

CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        lambda args: args.optimizer == "sgd" and args.use_distributed_optimizer,
        "--optimizer sgd does not go with --use-distributed-optimizer, which keeps Adam's state: "
        "leave one of them out",
    ),
    Conflict(
        lambda args: (
            args.lr_decay_style == "WSD"
            and args.lr_wsd_decay_iters is None
            and args.lr_wsd_decay_samples is None
        ),
        "--lr-decay-style WSD needs to know when to decay: give --lr-wsd-decay-iters, or "
        "--lr-wsd-decay-samples with --train-samples",
    ),
    Conflict(
        lambda args: (
            args.recompute_granularity == "full"
            and None in (args.recompute_method, args.recompute_num_layers)
        ),
        "--recompute-granularity full needs --recompute-method and --recompute-num-layers",
    ),
    Conflict(
        lambda args: args.distribute_saved_activations and args.sequence_parallel,
        "--distribute-saved-activations does not go with --sequence-parallel, which has split them "
        "already: leave it out",
    ),
    Conflict(
        lambda args: args.mlp_chunks_for_training > 1 and args.fp8 is not None,
        "--mlp-chunks-for-training does not go with --fp8-format: parts of a row do not have the "
        "multiples of tokens that FP8 takes; leave one of them out",
    ),
    Conflict(
        lambda args: args.async_save and args.async_strategy == "nvrx",
        "--async-save writes through nvidia-resiliency-ext by default, which has not been seen to "
        "work here: pass --async-strategy mcore",
    ),
    Conflict(
        lambda args: args.use_pytorch_profiler and args.tensorboard_dir is None,
        "--use-pytorch-profiler writes beside --tensorboard-dir: give one",
    ),
    Conflict(
        lambda args: args.profile and not args.use_pytorch_profiler and cpu.is_enabled(),
        "--profile alone is for Nsight Systems, on GPUs: add --use-pytorch-profiler",
    ),
)
