"""Real gloo ranks for tests, without paying for the imports each time.

A zygote process imports torch, Megatron and the package once, then forks the ranks of every request
it reads from standard input: `{"world", "target": "module:function", "args", "output"}`, one JSON
object a line. Each rank writes its pickled result (or its traceback) into `output`.
"""

import contextlib
import importlib
import json
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.managers import SyncManager
from pathlib import Path

from megatron_infifpo.gpu_check.processes import free_port
from megatron_infifpo.study.forks import import_commands, start_queues, take_queue


def run_rank(request: dict, rank: int, port: int, queues: SyncManager) -> None:
    """Call the target as one rank and leave its result in a file; never returns."""
    os.setsid()  # a group of its own, for what it starts in turn
    output = Path(request["output"])
    world = request["world"]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = open(output / f"rank{rank}.log", "w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    code = 0
    try:
        take_queue(queues)
        module, function = request["target"].split(":")
        result = getattr(importlib.import_module(module), function)(*request["args"])
        with open(output / f"rank{rank}.pickle", "wb") as f:
            pickle.dump(result, f)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        log.close()
        os._exit(code)


def serve(request: dict, queues: SyncManager) -> list[int]:
    """Fork the ranks of a request and return their exit codes; one failure ends the others."""
    port = free_port()
    pids = []
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            run_rank(request, rank, port, queues)
        pids.append(pid)
    codes: dict[int, int] = {}
    while codes.keys() < set(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] != 0:
            for other in set(pids) - codes.keys():
                os.kill(other, signal.SIGKILL)
    for pid in pids:
        # Saving a checkpoint starts a manager process, which outlives a rank that just exits.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print must not mix with the answers
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # as every command does
    for name in ("training", "tools", "tiny"):
        importlib.import_module(f"support.{name}")
    import_commands()
    queues = start_queues()
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line), queues)), file=answers, flush=True)
