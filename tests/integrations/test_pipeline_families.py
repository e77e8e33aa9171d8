"""``--init diffusers:P`` of each family of pipelines: the run draws the pipeline's own picture."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.backbones.diffusers import Diffusers
from genkit.cli import main as cli
from genkit.data import text
from genkit.integrations.diffusers_weights import init_defaults
from genkit.integrations.export import export
from genkit.training.run import init_from, load_run
from genkit.training.sampling import Sampling
from tests.support.pipelines import CAPTIONS, QUICK, largest, our_picture, their_picture

GUIDANCE = {"flux-dev": 3.5, "flux-schnell": 1.0, "ddim": 1.0}
FAMILIES = {
    "sdxl": "ddim", "sd3": "ddim", "flux-dev": "ddim", "flux-schnell": "ddim", "pixart": "dpmpp_2m", "sana": "ddim",
    "ddim": "ddim", "chroma": "ddim", "auraflow": "ddim", "lumina2": "ddim",
}  # fmt: skip


def pictures(pipeline_folder, run_of, name):
    """The run, its picture and the pipeline's."""
    guidance, side = GUIDANCE.get(name, 5.0), {"sana": 32, "lumina2": 64}.get(name, 16)  # Lumina2 assumes a factor of 8
    run = load_run(run_of(name), device="cpu")
    cond = {} if name == "ddim" else None
    sizes = {"height": side, "width": side}
    return run, our_picture(run, guidance=guidance, cond=cond), their_picture(pipeline_folder(name), guidance, **sizes)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_draws_the_picture_of_its_pipeline(pipeline_folder, run_of, name):
    run, ours, theirs = pictures(pipeline_folder, run_of, name)
    assert largest(ours, theirs) < 1e-5
    assert float(theirs.std()) > 0.05, "the pictures show nothing"
    assert Sampling().sampler_for(run) == FAMILIES[name]


@pytest.mark.slow  # a thousand files
def test_a_run_of_classes_draws_the_picture_of_its_pipeline(pipeline_folder, tmp_path):
    for i in range(1000):
        (tmp_path / "data" / f"{i:03}").mkdir(parents=True)
        Image.fromarray(np.full((16, 16, 3), i % 256, dtype=np.uint8)).save(tmp_path / "data" / f"{i:03}" / "0.png")
    init = f"--init=diffusers:{pipeline_folder('dit')}"
    assert cli.main(["train", init, f"--data={tmp_path}/data", f"--out={tmp_path}/runs", *QUICK]) == 0
    labels = [3, 77]
    ours = our_picture(load_run(tmp_path / "runs" / "latest", device="cpu"), cond={"label": torch.tensor(labels)})
    assert largest(ours, their_picture(pipeline_folder("dit"), class_labels=labels)) < 1e-5


TEETH = [
    (name, what)
    for name, things in {
        "sdxl": ("pooled", "sizes", "null", "guidance"),
        "sd3": ("pooled", "clock", "null", "shift"),
        "flux-dev": ("pooled", "clock", "guidance", "positions"),
        "pixart": ("mask", "null"),
        "sana": ("mask", "clock", "instruction"),
        "chroma": ("mask", "clock"),
        "auraflow": ("clock",),
        "lumina2": ("mask",),
    }.items()
    for what in things
]


@pytest.mark.parametrize(("name", "what"), TEETH)
def test_the_picture_depends_on_each_thing_that_the_network_is_told(
    pipeline_folder, run_of, name, what, monkeypatch, tmp_path
):
    run, ours, _ = pictures(pipeline_folder, run_of, name)
    net, guidance = run.nets["net"], GUIDANCE.get(name, 5.0)
    cond = text.encode_prompts(run.spec, ["a red square, 7", "blue"])
    if what == "pooled":
        cond["pooled"] = torch.zeros_like(cond["pooled"])
    elif what == "mask":
        cond["mask"] = torch.ones_like(cond["mask"])
    elif what == "guidance":
        guidance -= 1
    elif what == "null":
        net.sequences.null_tokens.add_(1.0)
    elif what == "clock":
        object.__setattr__(net.cfg, "clock", "index")
    elif what == "sizes":
        object.__setattr__(net.cfg.model, "size_factor", 8)
    elif what == "shift":
        cond, sampling = cond, {"grid": "uniform"}
        assert largest(our_picture(run, guidance=guidance, cond=cond, **sampling), ours) > 5e-3
        return
    elif what == "positions":
        inner = net.model.forward
        zero = lambda img_ids, **given: inner(img_ids=0 * img_ids, **given)  # noqa: E731
        monkeypatch.setattr(net.model, "forward", zero)
    else:
        encoder = text.open_encoder(f"diffusers:{pipeline_folder(name)}")
        monkeypatch.setitem(encoder.options, "complex_human_instruction", None)
        cond = text.encode_prompts(run.spec, ["a red square, 7", "blue"])
    assert largest(our_picture(run, guidance=guidance, cond=cond), ours) > 5e-3


@pytest.mark.parametrize("name", ["sd", "sd3", "flux-dev"])
def test_pictures_that_are_not_square(pipeline_folder, photos, tmp_path, name):
    guidance, init = GUIDANCE.get(name, 5.0), f"--init=diffusers:{pipeline_folder(name)}"
    args = [init, f"--data={photos}", "--data.size", "16", "32", f"--out={tmp_path}", *QUICK, CAPTIONS]
    assert cli.main(["train", *args]) == 0
    theirs = their_picture(pipeline_folder(name), guidance, height=16, width=32)
    assert theirs.shape == (2, 3, 16, 32)
    assert largest(our_picture(load_run(tmp_path / "latest", device="cpu"), guidance=guidance), theirs) < 1e-5


def test_either_clock_tells_the_same_time(pipeline_folder, run_of):
    """Runs of earlier versions have rotated weights instead: the same network, up to rounding."""
    run = load_run(run_of("sd3"), device="cpu")
    cfg = run.config.backbone
    old = Diffusers(cfg.model, cfg.timesteps, "index").denoiser(run.spec).eval()
    init_from({"net": old}, f"diffusers:{pipeline_folder('sd3')}")
    old.sequences.load_state_dict(run.nets["net"].sequences.state_dict())
    x, t = torch.randn(3, *run.spec.shape), torch.tensor([0.001, 0.4, 1.0])
    with torch.no_grad():
        ours, theirs = run.nets["net"](x, t, {}), old(x, t, {})
    assert torch.allclose(ours, theirs, atol=2e-5)
    weight = "time_text_embed.timestep_embedder.linear_1.weight"
    assert not torch.allclose(old.model.state_dict()[weight], run.nets["net"].model.state_dict()[weight], atol=1e-2)


def test_an_exported_flow_keeps_the_weights_that_it_began_with(pipeline_folder, run_of, tmp_path):
    export(run_of("sd3"), tmp_path / "out", to="diffusers")
    defaults = init_defaults(str(tmp_path / "out"))
    assert defaults["backbone"]["clock"] == "sigma"
    run = load_run(run_of("sd3"), device="cpu")
    again = Diffusers(run.config.backbone.model, 1000, "sigma").denoiser(run.spec)
    init_from({"net": again}, f"diffusers:{tmp_path}/out")
    for name, value in run.nets["net"].model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"_class_name": "HunyuanDiT2DModel"},
            "holds a HunyuanDiT2DModel, which genkit does not serve: it reads two sequences of words",
        ),
        ({"use_additional_conditions": True}, "use_additional_conditions=True; genkit supports only false"),
    ],
)
def test_families_that_are_not_served_are_refused(pipeline_folder, photos, tmp_path, capsys, change, words):
    folder = tmp_path / "p"
    shutil.copytree(pipeline_folder("pixart"), folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    args = [f"--init=diffusers:{folder}", f"--data={photos}", "--data.size=16", f"--out={tmp_path}/runs", *QUICK]
    assert cli.main(["train", *args, CAPTIONS]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_text_to_image_network_needs_the_words_of_its_pipeline(pipeline_folder, photos, tmp_path, capsys):
    args = [f"--init=diffusers:{pipeline_folder('sd3')}", f"--data={photos}", "--data.size=16", f"--out={tmp_path}/r"]
    assert cli.main(["train", *args, *QUICK]) == 2
    assert (
        "reads the words of its pipeline (tokens, pooled); given none; take --data.captions" in capsys.readouterr().err
    )
    other = f"--data.encoder=diffusers:{pipeline_folder('pixart')}"
    assert cli.main(["train", *args, *QUICK, CAPTIONS, other]) == 2
    assert "given mask, tokens" in capsys.readouterr().err


def test_all_conditions_of_a_text_are_dropped_together(run_of):
    run = load_run(run_of("sd3"), device="cpu")
    net, cond = run.nets["net"], text.encode_prompts(run.spec, ["red", "blue"])
    x, t, nobody = torch.randn(2, *run.spec.shape), torch.full((2,), 0.5), torch.zeros(2, dtype=torch.bool)
    with torch.no_grad():
        null, empty = net(x, t, {}), net(x, t, text.encode_prompts(run.spec, ["", ""]))
        assert torch.allclose(net(x, t, {**cond, "keep": nobody}), null, atol=1e-6)
        each = {"keep.text": nobody, "keep.pooled": nobody}
        assert torch.allclose(net(x, t, {**cond, **each}), null, atol=1e-6)
        assert torch.allclose(empty, null, atol=1e-6)
        assert largest(net(x, t, cond), null) > 1e-2
