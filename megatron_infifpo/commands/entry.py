"""What every command begins with: its rank, safe loading, and errors in one sentence."""

import os
import sys
from collections.abc import Callable

from megatron_infifpo.errors import user_errors
from megatron_infifpo.ranks import ranks_from_srun


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0 on success, else as `user_errors` says."""
    ranks_from_srun(os.environ)
    # PyTorch's checkpoint reader would unpickle objects of any kind.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    with user_errors():
        sys.exit(main() or 0)
