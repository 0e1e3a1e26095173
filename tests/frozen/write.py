"""Write flags.json and formats.json, from the repository's root, for a change that is meant.

PYTHONPATH=tests python tests/frozen/write.py [flags] [formats]
"""

import json
import sys
import tempfile
from pathlib import Path

from support import frozen, job_setup
from support.launcher import Ranks


def main(names: list[str]) -> None:
    """Write the files of these names, or both."""
    if not names or "flags" in names:
        write("flags", frozen.flags())
    if not names or "formats" in names:
        with tempfile.TemporaryDirectory() as name:
            ranks = Ranks(Path(name) / "ranks")
            setup = job_setup.make(Path(name) / "job", ranks)
            write("formats", frozen.formats(setup, ranks, Path(name)))
            ranks.close()


def write(name: str, found: dict) -> None:
    """Write one file, sorted and one value a line, so that a difference can be read."""
    path = frozen.FROZEN / f"{name}.json"
    text = json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
