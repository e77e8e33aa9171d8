"""Data sets of torch as data: a class by its name with its arguments as options, and an object in Python."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import genkit
from genkit.backbones import UNet
from genkit.cli import main as cli
from genkit.config import from_dict
from genkit.core import Backbone, Draw, Label
from genkit.data.torch_dataset import adapt, adapt_class
from genkit.training.run import load_run
from genkit.training.settings import TrainSettings

N = 50
TINY: dict[str, Any] = {"steps": 2, "batch": 8, "tensorboard": False, "workers": 0, "device": "cpu"}
MODULE = """
import torch
from torch.utils.data import Dataset

class Shades(Dataset):
    classes = ["dark", "bright"]
    def __init__(self, side: int = 8, scale: float = 1.0, transform=None):
        self.side, self.scale = side, scale
    def __len__(self):
        return 40
    def __getitem__(self, i):
        return torch.full((1, self.side, self.side), self.scale * i / 255), i % 2
"""


class Items(Dataset):
    """A data set of any items."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Halves(Dataset):
    """A data set with splits of its own, as torchvision's have them."""

    classes = ("a", "b", "c")

    def __init__(self, root: str = "", train: bool = True):
        self.rows = range(30) if train else range(30, 40)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return torch.full((3, 4, 4), self.rows[i], dtype=torch.uint8), self.rows[i] % 3


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the working directory, which is not on the path."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    name = f"my_data_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    yield name
    sys.modules.pop(name, None)


def load_all(source, split="train"):
    data = source.load(split)
    return data, data.batch(torch.arange(len(data)), Draw((0,), 0, len(data)))


PICTURES = {
    "float in [0, 1]": lambda v: (torch.full((1, 4, 4), v / 255), v % 2),
    "float in [-1, 1]": lambda v: (torch.full((1, 4, 4), v / 127.5 - 1), v % 2),
    "uint8": lambda v: {"image": torch.full((1, 4, 4), v, dtype=torch.uint8), "label": torch.tensor(v % 2)},
    "uint8 [H, W, C]": lambda v: {"x": np.full((4, 4, 3), v, np.uint8), "y": np.int64(v % 2)},
    "uint8 [H, W]": lambda v: (np.full((4, 4), v, np.uint8), v % 2),
}


@pytest.mark.parametrize("form", PICTURES)
def test_pictures_of_every_form_have_the_pixels_that_they_were_made_of(form):
    dataset = Items([PICTURES[form](v) for v in range(N)])
    data, batch = load_all(adapt(dataset).with_fields(held_out=0.2))
    _, test = load_all(adapt(dataset).with_fields(held_out=0.2), "test")
    values = [int(v) for v in batch.x.flatten(1)[:, 0]], [int(v) for v in test.x.flatten(1)[:, 0]]
    assert sorted(values[0] + values[1]) == list(range(N))
    assert data.x.dtype == torch.uint8
    assert batch.cond["label"].tolist() == [v % 2 for v in values[0]]
    assert data.num_held_out == len(values[1])


def test_numbers_are_scaled_by_the_training_samples():
    x = torch.arange(N * 3, dtype=torch.float64).reshape(N, 3)
    source = adapt(TensorDataset(x)).with_fields(held_out=0.2)
    data, batch = load_all(source)
    assert data.spec.shape == (3,)
    assert not data.spec.cond
    assert data.codec == source.load("test").codec
    assert abs(float(data.codec.encode(batch).x.mean())) < 1e-5


def test_a_class_with_splits_of_its_own_uses_them():
    source = from_dict(TrainSettings, {"data": f"{__name__}:Halves"}).data.with_decisions()
    train, batch = load_all(source)
    _, test = load_all(source, "test")
    assert [int(v) for v in batch.x[:, 0, 0, 0]] == list(range(30))
    assert [int(v) for v in test.x[:, 0, 0, 0]] == list(range(30, 40))
    assert train.spec.cond["label"] == Label(3, ("a", "b", "c"))


def test_a_class_in_the_working_directory_trains_and_is_found_again(module, capsys):
    """By the commands too that open the run later, if they are trusted, for its code runs."""
    argv = [f"--data={module}:Shades", "--data.scale=2", "--backbone.width=8", "--steps=2", "--batch=8"]
    assert cli.main(["train", *argv, "--no-tensorboard", "--workers=0", "--device=cpu"]) == 0
    assert "0 dark: " in capsys.readouterr().out
    run = load_run("runs/latest", device="cpu")
    assert run.config.data.scale == 2.0
    assert run.config.data.held_out == 0.1
    sys.modules.pop(module)
    sys.path[:] = [p for p in sys.path if p != str(run.directory.parents[1])]
    assert cli.main(["sample", "runs/latest"]) == 2
    assert "--trust" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENKIT_TRUST", "1")
        command = ["eval", "runs/latest", "--reference=test", "--features=raw", "--metrics=fid", "--n=8", "--steps=1"]
        assert cli.main([*command, "--device=cpu"]) == 0


def test_an_object_is_given_in_python(tmp_path):
    dataset = Items([(torch.full((1, 8, 8), i / 255), i % 2) for i in range(N)])
    settings = {"data": dataset, "backbone": {"width": 8}, "out": str(tmp_path), **TINY}
    run = genkit.train(**settings)
    assert run.spec.cond["label"].num == 2
    assert len(genkit.evaluate(run, reference="test", metrics="fid", features="raw", n=4, steps=1).metrics) == 1
    again = load_run(run.directory, device="cpu")  # config.yaml says what it was
    assert f"Items of {N} samples" in again.config.data.about
    other = adapt(Items([torch.zeros(3)] * N))
    assert other != again.config.data
    assert adapt(dataset).with_decisions() == again.config.data


REFUSED = {
    "empty": (lambda: Items([]), "holds no samples"),
    "words": (lambda: Items(["a", "b"]), "sample 0 is str"),
    "whole numbers": (lambda: Items([np.arange(3)] * 4), "needs a picture"),
    "two shapes": (lambda: Items([torch.zeros(1, 4, 4), torch.zeros(1, 5, 5)]), "sample 1 is float32"),
    "range": (lambda: Items([torch.full((1, 4, 4), 300.0)] * 4), "images are float in"),
    "classes": (lambda: Items([(torch.zeros(3), 0.5)] * 4), "the class of sample 0"),
    "some classes": (lambda: Items([(torch.zeros(3), 1), (torch.zeros(3), None)]), "sample 1 has no class"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_data_is_refused_in_one_line(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refused:
        adapt(make()).load("train")
    assert "\n" not in str(refused.value)


def test_a_stream_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="needs __len__"):
        adapt(Stream())


def test_arguments_that_no_option_can_give_are_refused():
    class NeedsMore(Dataset):
        def __init__(self, source: dict):
            pass

    with pytest.raises(ValueError, match="no option can give its argument source"):
        adapt_class(NeedsMore)


def test_a_backbone_has_the_networks_that_it_defines():
    class OnlyDenoiser(Backbone):
        def denoiser(self, spec):
            return torch.nn.Identity()

    class OnlyCode(Backbone):
        def encoder(self, spec, out):
            return torch.nn.Identity()

    assert UNet.cuts == ("denoiser", "encoder", "decoder")
    assert OnlyDenoiser().cuts == ("denoiser",)
    with pytest.raises(ValueError, match="OnlyDenoiser: has no encoder, only denoiser"):
        OnlyDenoiser().encoder(None, (2,))
    with pytest.raises(ValueError, match="OnlyCode: has no denoiser, only encoder"):
        OnlyCode().denoiser(None)
