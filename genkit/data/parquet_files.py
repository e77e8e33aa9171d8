"""Images in parquet and arrow files, as Hugging Face datasets stores them, read by row through pyarrow.

Pictures are bytes: a binary column, or a column of ``{bytes, path}``. Arrow files are mapped into memory. Parquet files
are read by row groups, of which the last ones are kept decoded.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from genkit.core.files import format_error
from genkit.core.messages import warn_once
from genkit.data.captions import Caption, collapse_space
from genkit.data.image_files import ListedFile, list_status
from genkit.data.tar_files import RowClasses, number_classes

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "picture")
LABEL_COLUMNS = ("label", "fine_label", "cls", "class", "y")
TEXT_COLUMNS = ("text", "caption", "txt", "prompt")
CACHED_BYTES = 1 << 30  # of row groups that are kept decoded
INSTALL = "pip install 'genkit-torch[data]'"


class RowNames(Sequence[str]):
    """Names of rows, ``FILE/ROW``, made when they are asked for."""

    def __init__(self, files: Sequence[str], starts: Sequence[int]) -> None:
        self.files, self.starts = files, np.asarray(starts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        file = int(np.searchsorted(self.starts, i, side="right")) - 1
        return f"{self.files[file]}/{i - int(self.starts[file])}"


def import_pyarrow() -> Any:
    """``pyarrow``, with ``parquet``. ``ValueError`` if it is not installed."""
    try:
        import pyarrow  # lazy: optional
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"parquet: reading it needs pyarrow; install it: {INSTALL}") from None
    return pyarrow


class Table:
    """One file: its schema, and its groups of rows, which are read one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        pa = import_pyarrow()
        try:
            if path.suffix == ".parquet":
                self.file = pa.parquet.ParquetFile(path)
                self.schema = self.file.schema_arrow
                self.batches = None
                meta = self.file.metadata
                self.counts = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
            else:
                self.batches = list(open_arrow(pa, path))
                self.schema = self.batches[0].schema if self.batches else pa.schema([])
                self.counts = [batch.num_rows for batch in self.batches]
        except (pa.ArrowException, OSError) as e:
            raise ValueError(f"{path}: cannot be read ({path.suffix[1:]}): {format_error(e)}") from e

    def read(self, group: int, column: str) -> Any:
        """An array of one column of a group of rows. ``ValueError`` if it is damaged."""
        pa = import_pyarrow()
        try:
            if self.batches is not None:
                return self.batches[group].column(column)
            table = pa.parquet.ParquetFile(self.path).read_row_group(group, columns=[column])  # for several threads
            chunked = table.column(0)
            return chunked.chunk(0) if chunked.num_chunks == 1 else pa.concat_arrays(chunked.chunks)
        except (pa.ArrowException, OSError) as e:
            raise ValueError(f"{self.path}: row group {group} cannot be read: {format_error(e)}") from e

    def column(self, column: str) -> list[Any]:
        """All values of a column of numbers or text."""
        return [value for group in range(len(self.counts)) for value in self.read(group, column).to_pylist()]


def open_arrow(pa: Any, path: Path) -> Any:
    """The record batches of an arrow file in either format, mapped into memory."""
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(source)
        return (reader.get_batch(i) for i in range(reader.num_record_batches))


class GroupCache:
    """The last groups of rows that were read, up to ``CACHED_BYTES``; several threads wait for one reader of each."""

    def __init__(self, read: Any) -> None:
        self.read, self.lock = read, threading.Lock()
        self.groups: OrderedDict[tuple[int, int], Future[Any]] = OrderedDict()

    def get(self, key: tuple[int, int]) -> Any:
        """The array of a group."""
        with self.lock:
            future, is_new = self.groups.get(key), key not in self.groups
            if future is None:
                future = self.groups[key] = Future()
            self.groups.move_to_end(key)
        if is_new:
            try:
                future.set_result(self.read(*key))
            except BaseException as e:
                with self.lock:
                    self.groups.pop(key, None)
                future.set_exception(e)
            self.shrink()
        return future.result()

    def shrink(self) -> None:
        """Forget the groups that were used longest ago, except the last one."""
        with self.lock:
            sizes = {k: f.result().nbytes for k, f in self.groups.items() if f.done() and not f.exception()}
            total = sum(sizes.values())
            for key, size in list(sizes.items())[:-1]:
                if total <= CACHED_BYTES:
                    return
                del self.groups[key]
                total -= size


class TableRows:
    """The images of several parquet or arrow files in order, an ``ImageFiles``. ``ValueError`` names what is wrong."""

    def __init__(self, paths: Sequence[Path], image: str | None, label: str | None, text: str | None) -> None:
        self.tables = [Table(path) for path in paths]
        self.image = self.choose("image", image, IMAGE_COLUMNS)
        self.label, self.text = label, text
        self.file_starts = [0, *accumulate(sum(table.counts) for table in self.tables)]
        self.groups = [(t, g) for t, table in enumerate(self.tables) for g in range(len(table.counts))]
        self.starts = np.array([0, *accumulate(self.tables[t].counts[g] for t, g in self.groups)])
        if not self.starts[-1]:
            raise ValueError(f"{paths[0]}: holds no rows")
        self.row_names = RowNames([path.name for path in paths], self.file_starts)
        self.cache = GroupCache(lambda t, g: self.tables[t].read(g, self.image))

    def choose(self, what: str, given: str | None, usual: Sequence[str]) -> str:
        """The column that is ``given`` or has a usual name. ``ValueError`` if a file has none."""
        columns = self.tables[0].schema.names
        chosen = given or next((name for name in usual if name in columns), None)
        for table in self.tables:
            if chosen is None or chosen not in table.schema.names:
                raise ValueError(
                    f"{table.path}: has the columns {', '.join(table.schema.names)}; which holds the {what}? give "
                    f"--data.{what}-column"
                )
        assert chosen is not None
        return chosen

    @property
    def names(self) -> Sequence[str]:
        return self.row_names

    def location(self, i: int) -> str:
        file = int(np.searchsorted(np.array(self.file_starts), i, side="right")) - 1
        return f"{self.tables[file].path}/{i - self.file_starts[file]}"

    def read(self, i: int) -> bytes:
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        value = self.cache.get(self.groups[number])[i - int(self.starts[number])].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            kind = "a path" if isinstance(value, dict) and value.get("path") else type(content).__name__
            raise ValueError(f"{self.location(i)}: {self.image} is {kind}; needs the bytes of an image file")
        return content

    def values(self, column: str) -> list[Any]:
        """A column of all files."""
        return [value for table in self.tables for value in table.column(column)]

    def labels(self, as_names: bool = False) -> RowClasses | None:
        """:func:`number_classes` of a column, with the names of Hugging Face's ClassLabel, if it is one; None without
        such a column."""
        column = self.label or next((n for n in LABEL_COLUMNS if n in self.tables[0].schema.names), None)
        if column is None:
            return None
        column = self.choose("label", column, ())
        texts = ["" if value is None else str(value) for value in self.values(column)]
        classes = number_classes(texts, self.location, as_names)
        if classes is None or not classes.numbered:
            return classes
        return classes._replace(names=class_names(self.tables[0].schema, column))

    def captions(self) -> list[Caption]:
        """The captions. ``ValueError`` names a row without one."""
        captions, column = [], self.choose("text", self.text, TEXT_COLUMNS)
        values = self.values(column)
        if several := sum(isinstance(value, list) and len(value) > 1 for value in values):
            warn_once(f"{self.tables[0].path}: {several} of {len(values)} rows have several captions in {column}; only "
                      "the first of each is read")  # fmt: skip
        for i, value in enumerate(values):
            value = value[0] if isinstance(value, list) and value else value
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{self.location(i)}: has no caption")
            captions.append(Caption(collapse_space(value), self.location(i)))
        return captions

    def listing(self) -> list[ListedFile]:
        return [list_status(table.path, table.path.name) for table in self.tables]


def class_names(schema: Any, column: str) -> tuple[str, ...]:
    """The names in the description that Hugging Face datasets adds to a schema; () without."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[column].get("names") or ()))
    except (KeyError, ValueError, TypeError, AttributeError):
        return ()
