"""The two ways a command can end badly: input the user can mend (exit code 2) and a check that did not hold (1)."""

from __future__ import annotations


class RewriteError(Exception):
    """Bad input. The message is one line that says what is wrong, where, and how to fix it."""

    exit_code = 2


class CheckFailed(RewriteError):
    """A check the user asked for did not hold: an expected fusion is missing, two models differ."""

    exit_code = 1
