"""Python in pages, run as one rank."""

import os


def run_all(folder: str, snippets: list[str]) -> None:
    """Run snippets one after the other in a folder, each with names of its own."""
    os.chdir(folder)
    for snippet in snippets:
        exec(snippet, {})
