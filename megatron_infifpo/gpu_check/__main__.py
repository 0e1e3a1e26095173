"""One rank of a check: `python -m megatron_infifpo.gpu_check MODULE:FUNCTION ARGUMENT RESULT`."""

import importlib
import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Call the function with the argument, which is JSON, and leave its result in the file."""
    target, argument, output = sys.argv[1:]
    # As every command does: PyTorch's checkpoint reader would unpickle objects of any kind.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    module, function = target.split(":")
    result = getattr(importlib.import_module(module), function)(json.loads(argument))
    Path(output).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
