"""The counter of host waits, which `tools/gpu_check.py` needs, too."""

from megatron_infifpo.checks.host_waits import counted  # noqa: F401
