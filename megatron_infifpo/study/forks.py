"""Commands of `infifpo` in forks of one process that has imported everything.

The study runs thousands of short commands, and each would take longer to import than to work. A
fork has all the state of a fresh process, since the parent runs none itself.
"""

import argparse
import ctypes
import functools
import gc
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.gpu_check.processes import free_port

HEAVY = (
    "megatron_infifpo.training.run",
    "megatron_infifpo.scoring.megatron_backend",
    "megatron_infifpo.scoring.transformers_backend",
    "megatron_infifpo.responses.engines",
    # What these import as they run: at the first step of an optimizer, tokenizer, model.
    "torch._dynamo",
    "megatron.core.models.mimo",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)


PR_SET_PDEATHSIG = 1  # of Linux
_queues: list[SyncManager] = []


def warm_up() -> None:
    """Import what commands import, one thread each, and start what their saves share."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # as every command does
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import_commands()
    importlib.import_module("torch").set_num_threads(1)  # a core each; numbers depend on it
    _queues.append(start_queues())


def import_commands() -> None:
    """Import what commands import, and let Megatron read its sources for the help of flags."""
    for name in HEAVY:
        importlib.import_module(name)
    transformers = importlib.import_module("transformers")
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "PreTrainedTokenizerFast"):
        getattr(transformers, name)  # imports it
    remember_help_of_flags()
    gc.freeze()  # forks share it all, unless a collection writes to it


def remember_help_of_flags() -> None:
    """Let Megatron read its sources for the help of flags here, not in every fork."""
    from megatron.training.argument_utils import ArgumentGroupFactory as Factory
    from megatron.training.arguments import add_megatron_arguments

    factory: Any = Factory
    read = factory._get_field_docstrings
    known = functools.cache(lambda source: read(factory.__new__(factory), source))
    factory._get_field_docstrings = lambda self, source: known(source)
    add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def start_queues() -> SyncManager:
    """Start the one process that keeps the queues in which forks gather what a save has written.

    Megatron starts one in every process that saves.
    """
    return multiprocessing.get_context("spawn").Manager()


def take_queue(manager: SyncManager) -> None:
    """Let the saves of this fork use a queue of that process."""
    saving: Any = importlib.import_module(
        "megatron.core.dist_checkpointing.strategies.filesystem_async"
    )
    results: Any = importlib.import_module("megatron_infifpo.patches.saves")
    saving._results_queue = results.Results(manager.Queue())


def in_fork(main: Callable[[list[str]], None], words: Sequence[object], log: Path) -> None:
    """Run a command in a fork, once `warm_up` has imported all that it needs.

    Args:
        main: of the command; it exits as a command does.
        words: of its command line.
        log: receives what it prints.

    Raises:
        UserError: it failed; names the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    argv, port = [str(word) for word in words], free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            _alone(log, port)
            main(argv)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:  # what `main` does not report
            print(repr(error), file=sys.stderr)
        finally:
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # helpers of a save, which outlive it
    if code:
        raise UserError(f"{argv[0]} failed with exit code {code}: see {log}")


def _alone(log: Path, port: int) -> None:
    """Make this fork a job of one rank, its output in a file; it ends with its parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(number, 1)
    os.dup2(number, 2)
    take_queue(_queues[0])
