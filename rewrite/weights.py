"""Weights that lie outside the model's file: left where they are, copied by the kernel, or taken into the file."""

from __future__ import annotations

import errno
import fcntl
import filecmp
import functools
import hashlib
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx.external_data_helper import ExternalDataInfo

from rewrite.errors import RewriteError
from rewrite.files import write_atomically
from rewrite.validity import tensors

FICLONE = 0x40049409  # of <linux/fs.h>: the copy shares the original's blocks until one of the two changes
CHUNK = 1 << 30  # bytes asked of the kernel at once
UNSUPPORTED = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EPERM}


def place(source: Path, folder: Path, name: str) -> str:
    """Have the weights of `source` in `folder` under `name`, or under another name if a different file has this one.

    Weights that are there already are not touched, and never linked: newer versions of onnx refuse links. A file that is
    there is never overwritten: it may hold the weights of another model, or of the one being replaced. A link, a pipe or a
    folder of this name is such a file, too, and never written through. Returns the name.
    Raises RewriteError if the weights cannot be read or written.
    """
    try:
        link = next((p for p in (folder / name).parents if p != folder and p.is_relative_to(folder) and p.is_symlink()), None)
        if link is not None:
            raise RewriteError(f"{folder / name}: the weights cannot be copied there: {link} is a symbolic link; remove it, or choose another folder")
        if not os.path.lexists(folder / name):
            target = name
        elif _holds(folder / name, source):
            return name
        else:
            with source.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()[:12]
            target = str(Path(name).with_name(f"{Path(name).stem}.{digest}{Path(name).suffix}"))
            if _holds(folder / target, source):
                return target
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RewriteError(f"{folder / name}: the weights cannot be copied there: {error.strerror or error}; nothing was changed") from error
    write_atomically(folder / target, functools.partial(copy, source))
    return target


def _holds(file: Path, source: Path) -> bool:
    """Whether a file of a folder's own, which no link leads to, has the content of `source`."""
    try:
        found = file.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and (os.path.samefile(source, file) or filecmp.cmp(source, file, shallow=False))


def copy(source: Path, target: BinaryIO) -> None:
    """Copy a file inside the kernel: shared blocks where the filesystem can, else its data, holes left as holes."""
    with source.open("rb") as stream:
        try:
            fcntl.ioctl(target.fileno(), FICLONE, stream.fileno())
            return
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        try:
            _copy_extents(stream.fileno(), target.fileno())
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            stream.seek(0)
            target.seek(0)
            target.truncate()
            shutil.copyfileobj(stream, target)


def _copy_extents(source: int, target: int) -> None:
    size, position = os.fstat(source).st_size, 0
    os.ftruncate(target, size)
    while position < size:
        try:
            start = os.lseek(source, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        position, end = start, os.lseek(source, start, os.SEEK_HOLE)
        while position < end:
            copied = os.copy_file_range(source, target, min(end - position, CHUNK), position, position)
            if copied == 0:
                raise OSError(errno.EIO, "the weights were cut off while they were copied")
            position += copied


def relocated(proto: onnx.ModelProto, moved: Mapping[str, str]) -> onnx.ModelProto:
    """The model with its external data under other names."""
    if not moved:
        return proto
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for tensor in tensors(result):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = moved.get(entry.value, entry.value)
    return result


def external_size(files: Mapping[str, Path]) -> int:
    """Bytes of all files of external weights."""
    return sum(file.stat().st_size for file in files.values())


def embedded(proto: onnx.ModelProto, files: Mapping[str, Path], where: str) -> onnx.ModelProto:
    """The model with its external weights inside. Raises RewriteError if they do not fit or cannot be read."""
    outside = [(t, ExternalDataInfo(t)) for t in tensors(proto) if t.data_location == onnx.TensorProto.EXTERNAL]
    total = proto.ByteSize() + sum(info.length or 0 for _, info in outside)
    if total > onnx.checker.MAXIMUM_PROTOBUF:
        raise RewriteError(f"{where}: with its weights inside, the model is {total / 2**30:.1f} GiB, and a file holds 2 GiB; leave out --embed")
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for tensor in tensors(result):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _take_in(tensor, files)
    return result


def _take_in(tensor: onnx.TensorProto, files: Mapping[str, Path]) -> None:
    info = ExternalDataInfo(tensor)
    try:
        with files[info.location].open("rb") as stream:
            stream.seek(info.offset or 0)
            data = stream.read(-1 if info.length is None else info.length)
    except OSError as error:
        raise RewriteError(f"{files[info.location]}: the weights cannot be read: {error.strerror or error}") from error
    if info.length is not None and len(data) != info.length:
        raise RewriteError(f"{files[info.location]}: the weights of '{tensor.name}' end too early; the file changed since the model was read")
    tensor.raw_data = data
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.DEFAULT
