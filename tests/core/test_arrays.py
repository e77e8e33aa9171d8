"""What an .npz states about its size is checked before it is read, whoever reads it."""

import io
import zipfile

import numpy as np
import pytest

from genkit.core.arrays import open_npz
from genkit.data import DATA
from genkit.evaluation.metrics.moments import Moments
from genkit.evaluation.sources import is_statistics_file

NAMES = ("x", "arr_0", "mu", "sigma", "about", "x1", "obs", "action", "episode_ends")


def header(shape, dtype="<f8", version=(1, 0)):
    file = io.BytesIO()
    record = {"shape": shape, "fortran_order": False, "descr": dtype}
    (np.lib.format.write_array_header_1_0 if version == (1, 0) else np.lib.format.write_array_header_2_0)(file, record)
    return file.getvalue()


def too_large(archive, name):
    """Says that it has 8 TB, and has 80 bytes."""
    archive.writestr(f"{name}.npy", header((10**12,)) + bytes(80))


def too_large_by_far(archive, name):
    archive.writestr(f"{name}.npy", header((2**40, 2**40), version=(2, 0)) + bytes(80))


def inflating(archive, name):
    """Two GiB of zeros, stated in the directory of the archive, in 2 MB: only the first block is written here."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        member.write(header((2**28,)) + bytes(2**20))
    archive.getinfo(f"{name}.npy").file_size = 2**31 + 128


def pickled(archive, name):
    archive.writestr(f"{name}.npy", header((3,), "|O") + bytes(80))


BOMBS = [too_large, too_large_by_far, inflating, pickled]
READERS = {
    "npz": lambda path: DATA["npz"](root=str(path)).load(),
    "pairs": lambda path: DATA["pairs"](root=str(path)).load(),
    "replay": lambda path: DATA["replay"](root=str(path)).load(),
    "statistics": Moments.load,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("write", BOMBS)
def test_a_size_that_is_not_so_is_refused_before_it_is_reserved(tmp_path, write, read):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in NAMES:
            write(archive, name)
    with pytest.raises(ValueError, match=r"bomb\.npz.*(states|inflate|has .* GiB|never loaded)") as error:
        read(path)
    assert "\n" not in str(error.value)
    assert str(error.value).count(str(path)) == 1


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("content", [b"", b"no zip", np.arange(3.0).tobytes()])
def test_what_is_no_npz_is_one_line(tmp_path, content, read):
    path = tmp_path / "other.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"no \.npz, or a truncated"):
        read(path)
    assert not is_statistics_file(path)


def test_a_damaged_member_is_one_line(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=(100, 3)))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[300] ^= 255
    (tmp_path / "a.npz").write_bytes(bytes(content))
    for read in READERS.values():
        with pytest.raises(ValueError, match=r"damaged|needs|no array"):
            read(tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_ordinary_arrays_are_read(tmp_path, save):
    arrays = {"x": np.zeros((1000, 3)), "empty": np.zeros((0, 2)), "scalar": np.array(3), "text": np.array("é" * 9)}
    save(tmp_path / "a.npz", **arrays, structured=np.zeros(4, [("größe", "<f4")]), fortran=np.ones((3, 4), order="F"))
    with open_npz(tmp_path / "a.npz") as stored:
        assert all(np.array_equal(stored[k], v) for k, v in arrays.items())
        assert len(stored.files) == 6
