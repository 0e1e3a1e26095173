"""Groups and functions that the runner is tested with; they import nothing heavy."""

import os
import subprocess
import sys
import time
from pathlib import Path


def good(options, record):
    record.add("first", "passed", value=0.5, limit=1.0)
    record.skip("second", "not here")
    return {"devices": options.devices}


def crash(options, record):
    record.add("before", "passed")
    os.kill(os.getpid(), 11)


def raise_error(options, record):
    raise ValueError("three words only\nand more")


def hang(options, record):
    """Leave a process in a group of its own behind, and never end."""
    record.add("before", "passed")
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(command, process_group=0)
    Path(options.folder, "child").write_text(str(child.pid))
    time.sleep(600)


def failing(options, record):
    for name, value in (("good", 0.5), ("bad", 2.0), ("not a number", float("nan"))):
        with record.check(name, 1.0) as result:
            result.value = value
    with record.check("broken"):
        raise RuntimeError("kernel does not exist")
    with record.check("fast", 10.0, unit="pairs/s", at_least=True) as result:
        result.value = 12.0
    with record.check("slow", 10.0, unit="pairs/s", at_least=True) as result:
        result.value = 8.0
    with record.check("figure") as result:
        result.value = 3.0


def unusable(options, record):
    return {"unusable": "the driver is asleep", "devices": 0, "facts": {"driver": None}}


def usable(options, record):
    return {"unusable": None, "devices": 3, "facts": {"driver": "1.2"}}


def rank(argument):
    """What a rank knows of itself; with `bad`, that rank fails while the others wait."""
    me = int(os.environ.get("RANK", "0"))
    if me == argument.get("bad"):
        raise ValueError("rank of no use")
    if "bad" in argument:
        time.sleep(600)
    return {"rank": me, "world": int(os.environ.get("WORLD_SIZE", "1"))}
