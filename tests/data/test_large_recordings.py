"""Images of recordings larger than memory: read in pieces, once, into a mapped file, exactly as they are."""

import os
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from genkit.core import arrays
from genkit.data.demonstrations.frames import WithFrames, cached_pieces
from genkit.data.demonstrations.minari import Minari
from genkit.data.demonstrations.replay import Replay
from genkit.data.demonstrations.robomimic import Robomimic
from tests.support.refusals import refuses

SHAPE = (600, 40, 48, 3)
ENDS = [100, 180, 260, 400, 500, 600]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arrays, "PIECE", 2**16)  # 11 images
    return tmp_path / "cache"


def make_images():
    return np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)


def make_buffer(images):
    numbers = np.random.default_rng(1).normal(size=(len(images), 2)).astype("f4")
    return {"img": images, "obs": numbers, "action": numbers + 1, "episode_ends": np.array(ENDS)}


def write_npz(folder, images, save=np.savez):
    save(folder / "a.npz", **make_buffer(images))
    return Replay(root=str(folder / "a.npz"), frames=("img",))


def write_compressed_npz(folder, images):
    return write_npz(folder, images, np.savez_compressed)


def write_zarr(folder, images, name="a.zarr"):
    zarr = pytest.importorskip("zarr")
    root = str(folder / name)
    with zarr.storage.ZipStore(root, mode="w") if name.endswith("zip") else zarr.storage.LocalStore(root) as store:
        group = zarr.open_group(store, mode="w")
        for key, values in make_buffer(images).items():
            chunks = (10, 40, 48, 3) if key == "img" else values.shape
            place = f"meta/{key}" if key == "episode_ends" else f"data/{key}"
            group.create_array(place, data=values, chunks=chunks)
    return Replay(root=root, frames=("img",))


def write_zipped_zarr(folder, images):
    return write_zarr(folder, images, "a.zarr.zip")


def write_robomimic(folder, images):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "a.hdf5", "w") as file:
        for i, (a, b) in enumerate(pairwise([0, *ENDS])):
            file[f"data/demo_{i}/actions"] = make_buffer(images)["action"][a:b]
            file[f"data/demo_{i}/obs/img"] = images[a:b]
    return Robomimic(root=str(folder / "a.hdf5"), observed=(), frames=("img",))


def write_minari(folder, images):
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    observed = spaces.Dict({"img": spaces.Box(0, 255, SHAPE[1:], np.uint8)})
    numbers, buffers = make_buffer(images)["action"], []
    for i, (a, b) in enumerate(pairwise([0, *ENDS])):
        rows = [*range(a, b), b - 1]  # an observation more than actions
        ends = np.arange(a, b) == b - 1
        buffers.append(EpisodeBuffer(id=i, seed=i, options=None, observations={"img": images[rows]}, infos={},
                                     actions=numbers[a:b], rewards=numbers[a:b, 0], terminations=ends,
                                     truncations=ends & False))  # fmt: skip
    minari.create_dataset_from_buffers(
        "test/large-v0", buffers, observation_space=observed, action_space=spaces.Box(-9, 9, (2,), np.float32),
        algorithm_name="none", code_permalink="none", author="nobody", author_email="none", description="none",
        jpeg_encoding=False,
    )  # fmt: skip
    return Minari(root="test/large-v0", frames=("img",))


FORMATS = [write_npz, write_compressed_npz, write_zarr, write_zipped_zarr, write_robomimic, write_minari]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", FORMATS)
def test_images_are_read_in_pieces_and_are_as_recorded(write, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    images = make_images()
    source = write(tmp_path, images)
    (small,) = replace(source, image_size=(20, 12)).images()  # also imports what it needs
    tracemalloc.start()
    (read,) = source.images()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(read, np.memmap)
    assert np.array_equal(read, images.transpose(0, 3, 1, 2))
    assert peak < images.nbytes * (0.7 if write is write_minari else 0.2)  # whose pieces are episodes
    one = np.asarray(Image.fromarray(images[599]).resize((12, 20)))
    assert np.array_equal(small[599].transpose(1, 2, 0), one)
    assert small.shape == (600, 3, 20, 12)


def test_images_may_be_larger_than_memory_and_numbers_may_not(tmp_path, monkeypatch):
    images = make_images()
    sources = [write_npz(tmp_path, images), write_zarr(tmp_path, images)]
    monkeypatch.setattr(arrays.psutil, "virtual_memory", lambda: SimpleNamespace(total=10_000))
    for source in sources:
        data = source.load()
        assert isinstance(data, WithFrames)
        assert data.frames is not None
        assert len(data.frames) == 600
        refuses(replace(source, observed=("img",)).load, "img", "GiB of memory")


def test_images_in_the_order_of_fortran_are_the_same(tmp_path):
    images = make_images()
    (read,) = write_npz(tmp_path, np.asfortranarray(images)).images()
    assert np.array_equal(read, images.transpose(0, 3, 1, 2))


def test_changed_files_are_read_again_and_damaged_ones_leave_nothing(tmp_path, cache):
    images = make_images()
    source = write_zarr(tmp_path, images)
    source.images()
    write_zarr(tmp_path, 255 - images)
    assert np.array_equal(source.images()[0], 255 - images.transpose(0, 3, 1, 2))
    source = write_compressed_npz(tmp_path, images)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[10**6] ^= 255
    (tmp_path / "a.npz").write_bytes(bytes(content))
    refuses(lambda: source.images(), "a.npz: img is damaged")
    assert len([p for p in cache.rglob("*") if p.is_file()]) == 2
    write_npz(tmp_path, images[:550])
    refuses(lambda: source.images(), "img has 550 steps of 600", "episode 5")


def test_images_of_several_sizes_are_resized_only_if_a_size_is_asked_for(tmp_path):
    (tmp_path / "f").touch()
    pieces = [np.zeros((2, 4, 5, 3), np.uint8), np.zeros((2, 8, 5, 3), np.uint8)]

    def read(size):
        return cached_pieces([tmp_path / "f"], "img", (4, 3, 4, 5), lambda: pieces, size)

    assert read((4, 5)).shape == (4, 3, 4, 5)
    refuses(lambda: read(None), "img has images of 4x5 and of 8x5; give --data.image-size H W")  # though they are there


def test_a_damaged_file_of_the_cache_is_named(tmp_path, cache):
    source = write_npz(tmp_path, make_images())
    source.images()
    (path,) = (p for p in cache.rglob("*.npy"))
    os.truncate(path, 1000)
    refuses(lambda: source.images(), path.name, "cannot be read", "remove it, and it is made again")


def test_observations_of_robomimic_do_not_take_the_place_of_actions(tmp_path):
    h5py = pytest.importorskip("h5py")
    source = write_robomimic(tmp_path, make_images())
    before = source.episodes("train")[0].actions
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        for episode in file["data"].values():
            episode["obs/actions"] = np.zeros((len(episode["actions"]), 5))
    assert np.array_equal(source.episodes("train")[0].actions, before)


def test_fewer_images_than_stated_and_other_channels_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "f").touch()
    pieces = [np.zeros((2, 4, 5, 3), np.uint8)] * 3
    refuses(lambda: cached_pieces([tmp_path / "f"], "img", (7, 3, 4, 5), lambda: pieces, None), "6 images of 7")
    assert len(cached_pieces([tmp_path / "f"], "img", (5, 3, 4, 5), lambda: pieces, None)) == 5
    source = write_robomimic(tmp_path, make_images())
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        del file["data/demo_1/obs/img"]
        file["data/demo_1/obs/img"] = np.zeros((80, 40, 48, 1), np.uint8)
    refuses(lambda: source.images(), "images of 3 and of 1 channels")
