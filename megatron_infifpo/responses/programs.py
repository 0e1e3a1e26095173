"""Judges that are functions of the user's: `FILE.py:FUNCTION`, and what goes wrong in them."""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.responses.answers import Response
from megatron_infifpo.responses.prompts import Prompt

Scorer = Callable[[Prompt, Sequence[Response]], list[float]]
"""Takes a prompt and responses to it; returns a score for each answer, higher is better."""
LONGEST = 200  # characters of what an exception says


class UnjudgedError(UserError):
    """A judge does not take a prompt.

    Attributes:
        reason: in words that fit every prompt of the kind.
    """

    def __init__(self, message: str, reason: str) -> None:
        """Say which prompt and why, and the reason alone."""
        super().__init__(message)
        self.reason = reason


def load_program(name: str) -> Callable[[Prompt, str], Any]:
    """Load `FILE.py:FUNCTION`.

    Raises:
        UserError: there is no such file or function, or the file cannot be imported.
    """
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise UserError(f"--program {name}: expected FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise UserError(f"--program {name}: {path}: no such file")
    spec = importlib.util.spec_from_file_location("infifpo_program", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses ask for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"--program {name}: {path} cannot be imported: {_said(error)}{_line(error, path)}"
        ) from None
    score = getattr(module, function, None)
    if not callable(score):
        raise UserError(f"--program {name}: {path} has no function {function!r}")
    return score


def program_scorer(name: str) -> Scorer:
    """Load `FILE.py:FUNCTION`; it takes (prompt, response) and returns a number.

    Raises:
        UserError: as `load_program`.
    """
    score, path = load_program(name), name.rpartition(":")[0]

    def judge(prompt: Prompt, answer: Response, number: int) -> Any:
        try:
            found = score(prompt, answer.text)
            return found.item() if hasattr(found, "item") else found  # numpy's and torch's numbers
        except UnjudgedError:
            raise
        except Exception as error:
            raise UnjudgedError(
                f"{name} raised {_said(error)} on response {number} of prompt {prompt.id!r}"
                + _line(error, path),
                f"{name} raised {type(error).__name__}",
            ) from error

    def scores(prompt: Prompt, answers: Sequence[Response]) -> list[float]:
        return [judge(prompt, answer, number) for number, answer in enumerate(answers, 1)]

    return scores


def _said(error: BaseException) -> str:
    """Return an exception in a line, as Python writes it."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    text = " ".join(repr(error).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _line(error: BaseException, path: str) -> str:
    """Return where in a file of the user's an exception came from; empty where it is unknown."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == Path(path).resolve()]
    line = error.lineno if isinstance(error, SyntaxError) and not lines else None
    line = lines[-1] if lines else line
    return "" if line is None else f" ({Path(path).name} line {line})"
