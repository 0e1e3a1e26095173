"""Write the pages of `--help`: python -m megatron_infifpo.commands.help [NAME ...]."""

import sys

from megatron_infifpo.commands.help import make_pages, overview, pages_of
from megatron_infifpo.commands.main import PAGES


def main(names: list[str]) -> None:
    """Write all pages, and delete those of commands that are gone; or write those of some."""
    if names:
        pages = {"infifpo": overview()}
        for name in names:
            pages |= pages_of(name)
    else:
        pages = make_pages()
        for path in PAGES.glob("*.txt"):
            path.unlink()
    for name, text in pages.items():
        (PAGES / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
