"""What one process tells the others that it has written."""

import queue
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_infifpo.patches import cpu

cpu.enable(announce=False)

from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

from megatron_infifpo.patches.saves import queue_of_results  # noqa: E402


def test_kept_by_a_process_that_imports_nothing(monkeypatch):
    """One for all saves; what is put is what is taken, and PyTorch is not loaded to keep it."""
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    results = queue_of_results()
    assert queue_of_results() is results
    manager = results._queue._manager
    try:
        results.put({0: [MetadataIndex("weight", (0, 2))]})
        results.put(OSError("no space"))
        assert "libtorch" not in Path(f"/proc/{manager._process.pid}/maps").read_text()
        assert results.get_nowait() == {0: [MetadataIndex("weight", (0, 2))]}
        assert isinstance(results.get_nowait(), OSError)
        with pytest.raises(queue.Empty):
            results.get_nowait()
    finally:
        manager.shutdown()
