"""Flags of short training runs in which every flag of the class `gpu` takes part.

`infifpo gpu-check` starts them, and compares their losses with those of the same runs without.
"""

from dataclasses import dataclass

TE, NVML, FLASH = "transformer_engine", "pynvml", "flash_attn"


@dataclass(frozen=True)
class GpuRun:
    """A run of a few steps in bfloat16.

    Attributes:
        name: of it.
        flags: beside those of any run; `{folder}` in one stands for an empty folder.
        package: that must be installed.
        fp8: needs FP8 products.
        resumed: what it saves halfway is gone on from, too.
    """

    name: str
    flags: tuple[str, ...]
    package: str | None = None
    fp8: bool = False
    resumed: bool = False


GPU_RUNS: tuple[GpuRun, ...] = (
    GpuRun("deterministic", ("--deterministic-mode", "--disable-bf16-reduced-precision-matmul")),
    GpuRun(
        "without fused kernels",
        (
            "--no-bias-swiglu-fusion", "--no-bias-dropout-fusion", "--no-rope-fusion",
            "--no-gradient-accumulation-fusion",
        ),
    ),
    GpuRun(
        "communication",
        (
            "--high-priority-stream-groups", "dp_cp", "--flight-recorder-dump-path", "{folder}",
            "--flight-recorder-trace-buffer-size", "100", "--flight-recorder-include-stack-trace",
            "--no-flight-recorder-dump-on-timeout", "--no-flight-recorder-include-only-active",
            "--no-flight-recorder-extra-dump-on-exec", "--nccl-communicator-config-path",
            "{folder}/nccl.yaml",
        ),
    ),
    GpuRun(
        "watched",
        (
            "--record-memory-history", "--memory-snapshot-path", "{folder}/memory.pickle",
            "--gpu-sniff-test-interval", "2", "--profile", "--profile-step-start", "1",
            "--profile-step-end", "2", "--nvtx-ranges", "--record-shapes",
        ),
    ),
    GpuRun(
        "watched by the driver",
        ("--log-energy", "--log-device-memory-used", "--log-memory-interval", "1"),
        package=NVML,
    ),
    GpuRun(
        "small optimizer state",
        (
            "--use-precision-aware-optimizer", "--main-params-dtype", "fp16", "--main-grads-dtype",
            "bf16", "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16",
        ),
        package=TE,
        resumed=True,
    ),
    GpuRun(
        "bits that bfloat16 lacks, saved whole",
        (
            "--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype",
            "bf16", "--dist-ckpt-optim-fully-reshardable",
        ),
        package=TE,
        resumed=True,
    ),
    GpuRun(
        "optimizer on the host",
        ("--use-precision-aware-optimizer", "--optimizer-cpu-offload"),
        package=TE,
        resumed=True,
    ),
    GpuRun(
        "optimizer partly on the host, saved whole",
        (
            "--use-precision-aware-optimizer", "--optimizer-cpu-offload",
            "--optimizer-offload-fraction", "0.5", "--overlap-cpu-optimizer-d2h-h2d",
            "--no-pin-cpu-grads", "--dist-ckpt-optim-fully-reshardable",
        ),
        package=TE,
        resumed=True,
    ),
    GpuRun(
        "attention of Transformer Engine",
        ("--te-attention", "--attention-backend", "fused"),
        package=TE,
    ),
    GpuRun(
        "FlashAttention of Transformer Engine",
        ("--te-attention", "--attention-backend", "flash", "--flash-attention-version", "2"),
        package=FLASH,
    ),
    GpuRun(
        "FP8 scaled by past values",
        (
            "--fp8-format", "hybrid", "--fp8-margin", "1", "--fp8-amax-history-len", "16",
            "--fp8-amax-compute-algo", "max",
        ),
        package=TE,
        fp8=True,
    ),
    GpuRun(
        "FP8 scaled by present values",
        (
            "--fp8-format", "e4m3", "--fp8-recipe", "tensorwise", "--no-fp8-wgrad",
            "--first-last-layers-bf16", "--num-layers-at-start-in-bf16", "2",
            "--num-layers-at-end-in-bf16", "0",
        ),
        package=TE,
        fp8=True,
    ),
)  # fmt: skip

# What the `{folder}/nccl.yaml` of a run holds: options of NCCL's communicators, by group.
NCCL = "dp_cp:\n  cga_cluster_size: 2\n  max_ctas: 16\n  min_ctas: 4\n"
