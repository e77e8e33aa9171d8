"""What a run is measured against: another run, but never the plots in the directory of one."""

import numpy as np
import pytest
from PIL import Image

from genkit.cli import main as cli
from genkit.evaluation import evaluate
from genkit.evaluation.sources import REFERENCE_SEED
from genkit.training.run import load_run
from tests.support.evaluation import evaluate_to_card, reference_fid, refusal, save_vectors, train, values


def draw(run, n, seed):
    """Samples of a run as NumPy has them."""
    return load_run(run, device="cpu").sample(n, seed=seed, sampler="heun", steps=2).x.double().numpy()


def test_a_run_is_measured_against_samples_of_another(tmp_path, moons):
    other = train(tmp_path, "--data=moons", "--data.n=400", "--backbone.width=8", "--steps=3")
    card = evaluate_to_card(tmp_path, moons, other, "--metrics=fid,w2", "--n=60", "--steps=2", "--seed=3")
    expected = reference_fid(draw(moons, 60, 3), draw(other, 60, 3 + REFERENCE_SEED))
    assert values(card)["fid"] == pytest.approx(expected, rel=1e-4)
    reference = card.settings["reference"]
    assert (reference["run"], reference["step"], reference["n"]) == (other.name, 3, 60)
    assert (reference["sampler"], reference["steps"], reference["seed"]) == ("heun", 2, 3 + REFERENCE_SEED)
    assert f"against 60 of samples of {other.name} at step 3" in card.summary()


def test_a_run_against_itself_is_measured_on_other_noise(tmp_path, moons):
    """The same noise would give the distance 0, which no other model could reach."""
    card = evaluate(moons, reference=str(moons), metrics="w2", n=60, steps=2, device="cpu")
    assert card.metrics["w2"].value > 0.01
    stored = tmp_path / "samples.npz"
    assert cli.main(["sample", str(moons), "--n=60", "--steps=2", "--format=npz", f"--out={stored}"]) == 0
    assert evaluate(stored, reference=str(moons), metrics="w2", device="cpu").metrics["w2"].value > 0.01


def test_stored_samples_are_measured_against_a_run(tmp_path, moons):
    points = save_vectors(tmp_path / "a.npz", np.random.default_rng(0).normal(size=(40, 2)))
    card = evaluate_to_card(tmp_path, points, moons, "--metrics=fid,w2")
    assert (card.settings["n"], card.settings["reference"]["n"]) == (40, 40)


def test_a_sweep_takes_a_run_as_reference(tmp_path, moons):
    argv = ["--steps", "2", "--n=20", "--confirm-n=20", f"--reference={moons}", "--device=cpu"]
    assert cli.main(["sweep", str(moons), *argv]) == 0


def make_run_directory(root):
    """A directory as training leaves it: plots and grids beside the configuration."""
    for name in ("loss.png", "samples/step-0000010.png", "samples/drawn/000000.png", "samples/drawn/000001.png",
                 "space/map.png"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / name)
    for name in ("config.yaml", "env.json"):
        (root / name).write_text("{}")
    return root


@pytest.mark.parametrize("place", ["runs", "runs/0000-x", "runs/0000-x/samples", "runs/0000-x/space"])
def test_the_pictures_of_a_run_are_no_data(tmp_path, capsys, place):
    """Neither as samples, nor as a reference, nor to train on, however the folder is named."""
    run, images = make_run_directory(tmp_path / "runs" / "0000-x"), tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), 9 * i, np.uint8)).save(images / f"{i}.png")
    folder, few = tmp_path / place, ("--features=raw", "--metrics=fid")
    commands = [("eval", images, f"{folder}:train", *few), ("eval", images, f"--reference={folder}:train", *few),
                ("train", f"--data={folder}", f"--out={tmp_path}/out"),
                ("train", "--data=folder", f"--data.root={folder}", f"--out={tmp_path}/out")]  # fmt: skip
    if place != "runs/0000-x":
        commands += [("eval", folder, images, *few), ("eval", images, folder, *few)]
    for argv in commands:
        line = refusal(capsys, *argv)
        assert f"plots and grids of the run {run.resolve()}" in line
        assert "genkit sample" in line
    assert not (tmp_path / "out").exists()


def test_samples_that_genkit_wrote_into_a_run_are_data(tmp_path, capsys):
    drawn = make_run_directory(tmp_path / "0000-x") / "samples" / "drawn"
    assert cli.main(["eval", str(drawn), str(drawn), "--features=raw", "--metrics=fid"]) == 0
    assert "2 samples against 2" in capsys.readouterr().out


@pytest.fixture(scope="module")
def small_images(tmp_path_factory):
    """A run on 8x8 grey images without classes."""
    argv = ["--data=digits", "--data.labels=false", "--backbone.width=8", "--steps=2"]
    return train(tmp_path_factory.mktemp("small"), *argv)


@pytest.mark.parametrize("sizes", [(8,), (24,), (16, 24)])
def test_a_folder_of_images_is_measured_at_the_size_of_the_run(tmp_path, small_images, sizes, capfd):
    """The same numbers as with the size and the channels given; a message unless the images have them already."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        side = sizes[i % len(sizes)]
        pixels = rng.integers(0, 256, (side, side) if sizes == (8,) else (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    argv = ["--metrics=fid", "--features=raw", "--n=40", "--steps=2"]
    plain = evaluate_to_card(tmp_path, small_images, folder, *argv)
    said = capfd.readouterr().err
    given = evaluate_to_card(tmp_path, small_images, folder, *argv, "--data.size=8", "--data.channels=1")
    assert values(plain) == values(given)
    assert ("converted to 1x8x8" in said) == (sizes != (8,))
    with pytest.raises(ValueError, match="has samples"):
        evaluate(small_images, reference=str(folder), metrics="fid", features="raw", n=40, steps=2, device="cpu",
                 data={"size": 4, "channels": 1})  # fmt: skip


def test_options_of_other_data_are_refused_for_the_run_s_own(grey, tmp_path, capsys):
    """They had no effect."""
    for option in ("--data.size=4", "--data.channels=3"):
        name = option.partition("=")[0].strip("-")
        for reference in ([], ["--reference=train"]):
            assert f"{name}: has no effect on the run's own data" in refusal(capsys, "eval", grey, option, *reference)
