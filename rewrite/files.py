"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from rewrite.errors import RewriteError


def check_target(path: str | os.PathLike[str]) -> None:
    """Can a file be written at `path`? Asked before long work. Raises RewriteError with the reason if not."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    except (OSError, ValueError) as error:  # the name is too long, say
        raise RewriteError(f"{path}: cannot be written: {getattr(error, 'strerror', error)}; choose another name") from error
    if stat.S_ISDIR(mode):
        raise RewriteError(f"{path}: cannot be written: it is a directory; give the name of a file")
    if not stat.S_ISREG(mode):
        raise RewriteError(f"{path}: cannot be written: it is a device or a pipe, not a regular file")
    if not path.parent.is_dir():
        raise RewriteError(f"{path}: cannot be written: the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise RewriteError(f"{path}: cannot be written: the folder {path.parent} is read-only; choose another")


def check_apart(path: str | os.PathLike[str], kept: Iterable[tuple[str, str | os.PathLike[str]]]) -> None:
    """Would a file written at `path` leave those of `kept` alone, each given with what it is? Raises RewriteError if not."""
    for what, other in kept:
        if os.path.realpath(path) == os.path.realpath(other):
            raise RewriteError(f"{path}: cannot be written: it is {what} as well; choose another name")


def check_outside(path: str | os.PathLike[str], plan: str | os.PathLike[str]) -> None:
    """Raises RewriteError if a file written at `path` would lie in the folder of a plan, or be one of its own."""
    if Path(os.path.realpath(plan)) in Path(os.path.realpath(path)).parents:
        raise RewriteError(f"{path}: cannot be written: it lies in the plan {plan}; choose another folder")


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object], then: Callable[[], None] = lambda: None) -> None:
    """Call `write` on a temporary file beside `path`, flush it to the disk, and rename it to `path`.

    `then` is done before that: what is to be there only if this file can be written, and the other way round.
    Whatever fails, `path` holds the old content or the new one, whole. Raises RewriteError if it cannot be written.
    """
    path = Path(path)
    check_target(path)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:50]}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        then()
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
        temporary = None
        _settle(path)
    except OSError as error:
        raise RewriteError(f"{path}: cannot be written: {error.strerror or error}; nothing was changed") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def move_into_place(files: list[Path], folder: Path) -> None:
    """Flush files to the disk and rename them into `folder`, in order; the last one is what makes the others count.

    Raises OSError if one cannot be written; those that are new in `folder` are gone then. Raises RewriteError if all stand in
    their places, but perhaps not on the disk yet.
    """
    for file in files:
        _flush(file)
    new = [folder / file.name for file in files if not (folder / file.name).exists()]
    try:
        for file in files:
            os.replace(file, folder / file.name)
    except OSError:
        for path in new:
            path.unlink(missing_ok=True)
        raise
    _settle(folder / files[-1].name)


def swap_directory(new: Path, target: Path) -> None:
    """Flush the folder `new` to the disk and put it in the place of `target`, which is then `new`, if it existed.

    On Linux the two change places in one step, so that there is a whole folder at every moment; where the file system
    cannot do that, the old one is moved away first. Raises OSError if nothing was changed, RewriteError if the new folder is
    there, but perhaps not on the disk yet.
    """
    for path in sorted(new.rglob("*")):
        _flush(path)
    _flush(new)
    if not os.path.lexists(target):
        os.rename(new, target)
    elif not _exchange(new, target):
        aside = new.with_name(new.name + ".old")
        os.rename(target, aside)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(aside, target)
            raise
        os.rename(aside, new)
    _settle(target)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code))


def _settle(path: Path) -> None:
    """Flush the folder in which something new stands as `path`. Raises RewriteError if that fails: the new is there all the same."""
    try:
        _flush(path.parent)
    except OSError as error:
        reason = f"its folder cannot be flushed to the disk ({error.strerror or error}), so it may be lost with the power"
        raise RewriteError(f"{path}: it is written, but {reason}; check the disk and write it again") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
