"""The two ways a command can end badly: input the user can mend (exit code 2) and a check that did not hold (1)."""

from __future__ import annotations

import traceback
from pathlib import Path


class RewriteError(Exception):
    """Bad input. The message is one line that says what is wrong, where, and how to fix it."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class Unfinished(RewriteError):
    """A model that was run under limits came to no end within them."""


class CheckFailed(RewriteError):
    """A check the user asked for did not hold: an expected fusion is missing, two models differ."""

    exit_code = 1

    def __init__(self, message: str):
        Exception.__init__(self, message)  # a list of what does not hold, perhaps: a line each


def interrupted(error: ImportError) -> bool:
    """Whether a module could not be imported because the program was to end: those of C++ tell it so."""
    return isinstance(error.__cause__, (KeyboardInterrupt, SystemExit))


def blame(error: BaseException) -> str:
    """An error in a user's code, with the place where it happened: `rules.py:12: ZeroDivisionError: division by zero`."""
    if isinstance(error, SyntaxError):
        return f"{Path(error.filename or '?').name}:{error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: " if frames else ""
    text = " ".join(str(error).split())[:300]
    return f"{where}{type(error).__name__}{': ' if text else ''}{text}"
