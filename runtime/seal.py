"""What keeps a plan from being changed unseen: the SHA-256 of every file, and a seal on the manifest that lists them.

    manifest.sha256   what `sha256sum -c` reads: the SHA-256 of manifest.json, and of manifest.hmac if there is one
    manifest.hmac     of a signed plan: the HMAC-SHA256 of manifest.json under the key

The seal finds damage. Who can change a plan can seal it again; only the HMAC tells that it comes from a holder of the key.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import hmac
import mmap
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from rewrite.errors import RewriteError

MANIFEST, SEAL, SIGNATURE = "manifest.json", "manifest.sha256", "manifest.hmac"
PIECE = 64 << 20  # bytes that have a SHA-256 of their own, so that large files are hashed by several threads
BLOCK = 256 << 10  # bytes of a piece that are looked at together, or written: for 8 MB at once Linux spends three times as long on finding pages
PROCESSORS = os.cpu_count() or 1
KEY_VARIABLE = "REWRITE_PLAN_KEY"
KEY_BYTES = 16, 4096  # smallest and largest size of a key file
MOST_TEXT = 1 << 28  # bytes of a manifest
AGAIN = "build the plan again"
NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)  # of a file in a plan: in the folder itself or one below


def read_key(path: str | os.PathLike[str] | None) -> bytes | None:
    """The key in file `path`, or in that which the environment's REWRITE_PLAN_KEY names; None if neither is given.

    Raises RewriteError if the file cannot be read, or is too short to be a secret.
    """
    path = os.environ.get(KEY_VARIABLE) or None if path is None else path
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            key = file.read(KEY_BYTES[1] + 1)
    except OSError as error:
        raise RewriteError(f"key file '{os.fspath(path)}': cannot be read: {error.strerror or error}; make one with `head -c 32 /dev/urandom > FILE`") from error
    if not KEY_BYTES[0] <= len(key) <= KEY_BYTES[1]:
        size = "more" if len(key) > KEY_BYTES[1] else len(key)
        raise RewriteError(f"key file {os.fspath(path)}: it has {size} bytes, a key has {KEY_BYTES[0]} to {KEY_BYTES[1]}; make one with `head -c 32 /dev/urandom > FILE`")
    return key


def digests(data: bytes | mmap.mmap) -> list[str]:
    """The SHA-256 of each 64 MiB of `data`, in order, computed in as many threads as there are processors; of nothing, one."""
    view = memoryview(data)
    pieces = [view[start : start + PIECE] for start in range(0, max(len(view), 1), PIECE)]
    if len(pieces) == 1:
        return [hashlib.sha256(view).hexdigest()]
    with ThreadPoolExecutor(min(len(pieces), PROCESSORS)) as pool:
        return list(pool.map(lambda piece: hashlib.sha256(piece).hexdigest(), pieces))


class Writer:
    """A file that is written piece by piece, each by a thread that hashes it block by block, while it is in its cache, and that
    goes to the disk meanwhile.

    What is given to `write` must not change before `digests`. Leave the context before the file is closed.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.parts = file, 0, list[memoryview]()
        self.pieces: list[Future[str]] = []
        self.flushes: list[Future[None]] = []
        self.pool = ThreadPoolExecutor(PROCESSORS + 1)  # one of them may wait for another's write to the same file
        self.flusher = ThreadPoolExecutor(1)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.flusher.shutdown(cancel_futures=True)

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while len(rest):
            part, rest = rest[: PIECE - self.size % PIECE], rest[PIECE - self.size % PIECE :]
            self.parts.append(part)
            self.size += len(part)
            if self.size % PIECE == 0:
                self._submit()

    def _submit(self) -> None:
        self.pieces.append(self.pool.submit(self._write, self.parts, len(self.pieces) * PIECE))
        self.parts = []
        if len(self.pieces) > 2 * PROCESSORS:
            self.pieces[-1 - 2 * PROCESSORS].result()  # so that not all of a file is waiting in memory

    def _write(self, parts: list[memoryview], at: int) -> str:
        digest = hashlib.sha256()
        for part in parts:
            while len(part):
                done = os.pwrite(self.file.fileno(), part[:BLOCK], at)
                digest.update(part[:done])
                part, at = part[done:], at + done
        self.flushes.append(self.flusher.submit(os.fdatasync, self.file.fileno()))
        return digest.hexdigest()

    def digests(self) -> list[str]:
        """As the function of this name gives them. Raises OSError if the disk did not take what was written."""
        if self.parts or not self.pieces:
            self._submit()
        found = [piece.result() for piece in self.pieces]
        for flush in self.flushes:
            flush.result()
        return found


@contextlib.contextmanager
def open_inside(folder: Path, name: str) -> Iterator[BinaryIO]:
    """A plan's file, open for reading. Raises RewriteError if `name` leads out of the folder, or to no regular file (links are not
    followed), and where it cannot be read, while it is open, too."""
    try:
        with _opened(folder, name) as file:
            yield file
    except FileNotFoundError as error:
        raise RewriteError(f"{folder / name}: is missing; {AGAIN}") from error
    except OSError as error:
        raise RewriteError(f"{folder / name}: cannot be read, or is a link: {error.strerror or error}; {AGAIN}") from error


def _opened(folder: Path, name: str) -> BinaryIO:
    if not NAME.fullmatch(name):
        raise RewriteError(f"{folder}: its manifest names a file {name!r}, which is not one inside the plan; {AGAIN}")
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in name.split("/")[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
            os.close(place)
            place = below
        opened = os.open(name.split("/")[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place)
    finally:
        os.close(place)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise RewriteError(f"{folder / name}: is not a regular file; {AGAIN}")
    return os.fdopen(opened, "rb")


def read_checked(folder: Path, name: str, size: int, expected: list[str]) -> bytes:
    """The content of a plan's file. Raises RewriteError unless it has this size and these digests."""
    with open_inside(folder, name) as file:
        check_size(folder / name, file, size)
        data = file.read(size + 1)
    check_digests(folder / name, data, expected)
    return data


def map_checked(folder: Path, name: str, size: int, expected: list[str]) -> bytes | mmap.mmap:
    """The same for a large file, which is mapped: its pages are read once, for the digests and for their use."""
    with open_inside(folder, name) as file:
        check_size(folder / name, file, size)
        data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if size else b""
    check_digests(folder / name, data, expected)
    return data


def map_unchecked(folder: Path, name: str, size: int) -> mmap.mmap:
    """A large file of this size, mapped; what is used of it must go through `check_pieces` first."""
    with open_inside(folder, name) as file:
        check_size(folder / name, file, size)
        if not size:
            raise RewriteError(f"{folder / name}: is empty; {AGAIN}")
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def check_pieces(path: Path, data: mmap.mmap, expected: list[str], ranges: list[tuple[int, int]]) -> None:
    """Compare the pieces that hold these ranges of bytes with their digests. Raises RewriteError if one differs."""
    needed = sorted({i for begin, end in ranges if begin < end for i in range(begin // PIECE, -(-end // PIECE))})
    kept: list[tuple[int, int]] = []  # the ranges, where they follow one another as one
    for begin, end in sorted(r for r in ranges if r[0] < r[1]):
        if kept and begin <= kept[-1][1]:
            kept[-1] = kept[-1][0], max(end, kept[-1][1])
        else:
            kept.append((begin, end))
    with ThreadPoolExecutor(max(1, min(len(needed), PROCESSORS))) as pool:
        found = list(pool.map(lambda i: _digest(data, i * PIECE, min((i + 1) * PIECE, len(data)), kept), needed))
    if any(i >= len(expected) or expected[i] != digest for i, digest in zip(needed, found, strict=True)):
        raise RewriteError(f"{path}: its content is not what was built (SHA-256 differs); {AGAIN}")


def _digest(data: mmap.mmap, begin: int, end: int, kept: list[tuple[int, int]]) -> str:
    """The SHA-256 of a piece. What of it lies in none of the ranges `kept` leaves the memory of this process again, block by block."""
    digest, view = hashlib.sha256(), memoryview(data)
    for start in range(begin, end, BLOCK):
        stop = min(start + BLOCK, end)
        digest.update(view[start:stop])
        place = bisect.bisect_right(kept, (start, len(data)))  # of the first range that begins after `start`
        used = (place and kept[place - 1][1] > start) or (place < len(kept) and kept[place][0] < stop)
        if start % mmap.PAGESIZE == 0 and not used:
            data.madvise(mmap.MADV_DONTNEED, start, stop - start)
    return digest.hexdigest()


def check_size(path: Path, file: BinaryIO, size: int) -> None:
    found = os.fstat(file.fileno()).st_size
    if found != size:
        raise RewriteError(f"{path}: has {found} bytes, another size than the {size} that the manifest says; {AGAIN}")


def check_digests(path: Path, data: bytes | mmap.mmap, expected: list[str]) -> None:
    if digests(data) != expected:
        raise RewriteError(f"{path}: its content is not what was built (SHA-256 differs); {AGAIN}")


def seal(folder: Path, key: bytes | None) -> None:
    """Seal the manifest in `folder`; with a key, sign it."""
    manifest = (folder / MANIFEST).read_bytes()
    sealed = {MANIFEST: manifest}
    if key is not None:
        sealed[SIGNATURE] = hmac.digest(key, manifest, "sha256").hex().encode() + b"\n"
        (folder / SIGNATURE).write_bytes(sealed[SIGNATURE])
    (folder / SEAL).write_text(_seal_of(sealed))


def _seal_of(files: dict[str, bytes]) -> str:
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())


def read_manifest(folder: Path, key: bytes | None) -> str:
    """The manifest's text, if its seal holds. Raises RewriteError if there is none, it was changed, or `key` did not sign it."""
    if not os.path.lexists(folder / MANIFEST):
        raise RewriteError(f"{folder}: not a plan: it has no {MANIFEST}; make one with `rewrite build`")
    names = [MANIFEST, SEAL] + ([SIGNATURE] if os.path.lexists(folder / SIGNATURE) else [])
    found = {}
    for name in names:
        with open_inside(folder, name) as file:
            found[name] = file.read(MOST_TEXT + 1)
        if len(found[name]) > MOST_TEXT:
            raise RewriteError(f"{folder / name}: is too large; {AGAIN}")
    written = found.pop(SEAL)
    if key is not None and SIGNATURE not in found:
        raise RewriteError(f"{folder}: a key is given, but the plan is not signed; build it with --sign-key, or load it without a key")
    if key is not None and not hmac.compare_digest(found[SIGNATURE], hmac.digest(key, found[MANIFEST], "sha256").hex().encode() + b"\n"):
        raise RewriteError(f"{folder}: the plan is not signed with this key, or was changed afterwards; {AGAIN} with --sign-key")
    if written != _seal_of(found).encode():
        raise RewriteError(f"{folder / SEAL}: does not fit {' and '.join(found)}: one was changed, or is of an older version; {AGAIN}")
    try:
        return found[MANIFEST].decode()
    except UnicodeDecodeError as error:
        raise RewriteError(f"{folder / MANIFEST}: not a manifest of this version ({error}); {AGAIN}") from error
