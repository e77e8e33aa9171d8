"""Images that are too many to read are identified by a listing of their files; on request by their content."""

import os

import pytest
import torch

from genkit.data import DATA
from genkit.data.images import OnDisk
from genkit.evaluation.measurement import measure_reference
from genkit.evaluation.metrics.features import Raw
from genkit.evaluation.sources import DataOptions, DatasetSamples, open_data
from tests.support.data import make_zip, picture, save


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        save(tmp_path / "pictures" / "ab"[i % 3 == 0] / f"{i}.png", picture(i))
    return tmp_path / "pictures"


def samples(root, name="folder", full=False, memory=0, **settings):
    source = DATA[name](root=str(root), memory=memory, held_out=settings.pop("held_out", 0.0), **settings)
    return DatasetSamples(source.load(), name, source, full_hash=full)


def test_a_listing_reads_no_image_and_counts_the_classes(folder, monkeypatch):
    listed, full = samples(folder), samples(folder, full=True)
    (content, counts), others = full.scan(), samples(folder, memory=1).scan()
    assert (content, counts.tolist()) == (others[0], others[1].tolist()), "that of the same images in memory"
    monkeypatch.setattr(OnDisk, "read", lambda self, rows: pytest.fail("reads"))
    digest, by_label = listed.scan()
    assert by_label.tolist() == counts.tolist() == [8, 4]
    assert listed.identity() == {"data": "folder", "split": "train", "listing_sha256": digest}
    assert full.identity()["sha256"] == content
    assert not {"sha256"} & listed.identity().keys()


def test_a_listing_depends_on_names_sizes_classes_and_settings_and_not_on_the_place(folder, tmp_path):
    first = samples(folder).hash()
    seen = {first}
    for settings in ({"size": 3}, {"channels": 1}, {"held_out": 0.4}, {"labels": False}):
        seen.add(samples(folder, **settings).hash())
    moved = folder.rename(tmp_path / "elsewhere")
    os.utime(moved / "a" / "1.png", ns=(5, 5))
    assert samples(moved).hash() == first
    (moved / "a" / "1.png").rename(moved / "a" / "x.png")
    seen.add(samples(moved).hash())
    with open(moved / "a" / "x.png", "ab") as file:
        file.write(b"\0")
    seen.add(samples(moved).hash())
    assert len(seen) == 7


def test_a_zip_is_listed_with_its_checksums(tmp_path):
    hashes = set()
    for seed in (0, 1):
        make_zip(tmp_path / "a.zip", {f"{i}.png": picture(seed) for i in range(3)})
        hashes.add(samples(tmp_path / "a.zip", "zip").hash())
    assert len(hashes) == 2


def test_a_reference_is_measured_again_if_a_file_has_changed(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    extractor = Raw().load("cpu", samples(folder).data)

    def mean():
        reference = samples(folder)
        reference.scan()
        return measure_reference(reference, extractor, 12).moments.mean

    before = mean()
    monkeypatch.setattr(OnDisk, "read", lambda self, rows: torch.zeros(len(rows), 3, 4, 4, dtype=torch.uint8))
    assert mean().equal(before), "remembered"
    os.utime(folder / "a" / "1.png", ns=(2**61, 2**61))
    assert not mean().equal(before)


def test_the_option_reaches_the_samples(folder):
    assert open_data(str(folder), DataOptions(full_hash=True)).full_hash
    assert not open_data(str(folder)).full_hash
