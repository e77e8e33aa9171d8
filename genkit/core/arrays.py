"""Arrays in .npz files, whose sizes are checked before anything is read; read whole or in pieces."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import psutil
from numpy.lib.npyio import NpzFile

from genkit.core.files import MARK, atomic_write, format_error, refuse_foreign

MAX_RATIO = 200  # by which an array of more than a GiB may be compressed
GIB = 2**30
PIECE = 2**24  # bytes of an array that are read at a time


class ArrayPieces(NamedTuple):
    """An array in a file that is read in pieces, because it may be larger than memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Iterator[np.ndarray]]
    """its rows ``[n, ...]`` in order, about ``PIECE`` bytes at a time; each call begins at the first"""


def rows_of_piece(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """How many rows of an array are read at a time."""
    size = int(np.prod([int(n) for n in shape[1:]], dtype=object)) * dtype.itemsize
    return max(1, PIECE // max(1, size))


@contextmanager
def open_npz(path: str | Path, names: Collection[str] | None = None) -> Iterator[NpzFile]:
    """``numpy.load`` of an .npz, without pickles, of which the arrays ``names`` are read; None: all.

    Raises ``ValueError``, without the path, if it is no .npz or damaged, or one of its arrays holds pickled objects,
    states a size that it does not have, does not fit into this machine's memory although it is read, or is compressed
    as only a decompression bomb is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if names is None or member.filename.removesuffix(".npy") in names:
                    require_memory(member.filename, member.file_size)
                require_size(archive, member)
        with np.load(path, allow_pickle=False) as stored:
            yield stored
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as e:
        raise ValueError(f"is no .npz, or a truncated or damaged one: {format_error(e)}") from e


def npz_pieces(path: str | Path, name: str) -> ArrayPieces:
    """An array of an .npz that :func:`open_npz` accepts, in pieces; one in Fortran's order is read whole.

    Reading raises ``ValueError`` if the array is damaged.
    """
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        shape, fortran_order, dtype = read_header(file)

    def read() -> Iterator[np.ndarray]:
        rows = rows_of_piece(shape, dtype)
        try:
            if fortran_order:
                with open_npz(path, [name]) as stored:
                    yield stored[name]
                return
            with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
                read_header(file)
                for first in range(0, shape[0], rows):
                    part = (min(rows, shape[0] - first), *shape[1:])
                    yield np.frombuffer(file.read(int(np.prod(part)) * dtype.itemsize), dtype).reshape(part)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as e:
            raise ValueError(f"{path}: {name} is damaged: {format_error(e)}") from e

    return ArrayPieces(shape, dtype, read)


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type of the array of an .npy that is open at its beginning."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def save_npz(path: str | Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write arrays by name as an .npz that says that genkit wrote it, atomically, and return its path."""
    with atomic_write(path) as part:
        with open(part, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]  # names are keywords
        with zipfile.ZipFile(part, "a") as archive:
            archive.comment = MARK.encode()
    return Path(path)


def refuse_other_kind(path: str | Path, names: Collection[str], option: str = "out") -> None:
    """``ValueError`` if ``path``, which is to be written, is there and is not an .npz of genkit's with arrays
    ``names``, but of another kind: demonstrations are not replaced by preference pairs."""
    refuse_foreign(path, option=option)
    path = Path(path).expanduser()
    if not path.is_file():
        return
    try:
        with zipfile.ZipFile(path) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist()]
    except zipfile.BadZipFile:
        held = []
    if not {*names} <= {*held}:
        raise ValueError(f"{option}: {path} exists, and holds {', '.join(held[:3]) or 'no arrays'}, not "
                         f"{' and '.join(names)}; give another --{option}, or move it")  # fmt: skip


def require_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """``ValueError`` unless a member of an .npz is an array of the size that it states."""
    if member.file_size > max(GIB, MAX_RATIO * member.compress_size):
        raise ValueError(
            f"{member.filename}: {member.compress_size} bytes inflate to {member.file_size / GIB:.1f} GiB; "
            f"allowed: {MAX_RATIO} times their size"
        )
    if not member.filename.endswith(".npy"):
        return
    with archive.open(member) as file:
        shape, _, dtype = read_header(file)
        size = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
        if dtype.hasobject:
            raise ValueError(f"{member.filename}: holds pickled objects, which are never loaded")
        if size != member.file_size - file.tell():
            raise ValueError(f"{member.filename}: states {dtype} {list(shape)}, but holds "
                             f"{member.file_size - file.tell()} bytes of {size}")  # fmt: skip


def require_memory(name: str, size: int) -> None:
    """``ValueError`` if an array of ``size`` bytes does not fit into this machine's memory."""
    total = psutil.virtual_memory().total
    if size > total:
        raise ValueError(f"{name}: has {size / GIB:.1f} GiB, and this machine {total / GIB:.1f} GiB of memory")
