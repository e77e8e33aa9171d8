"""A second data source in each batch, and the loss that holds an adapter near its base."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from genkit import config
from genkit.backbones import lora
from genkit.backbones.dit import DiT
from genkit.cli.main import main
from genkit.core import Batch, Draw, Spec, Text
from genkit.data import InMemory, text
from genkit.data.codecs import Identity
from genkit.objectives import OBJECTIVES
from genkit.training.directory import read_log
from genkit.training.prior import Preservation, make_stream
from genkit.training.settings import TrainSettings


def moons(n, **prior):
    block = {"data": {"name": "moons", "n": 30}, **prior}
    return config.from_dict(TrainSettings, {"data": {"name": "moons", "n": n}, "batch": 8, "prior": block})


# --------------------------------------------------------------------------------------------- the second data source
def test_rows_of_both_sources_have_their_share_weight_and_order():
    settings = moons(12, share=0.25, weight=3.0)
    first, second = settings.data.load("train"), settings.prior.data.load("train")
    stream = make_stream(settings, first, torch.device("cpu"))
    batches = [stream(step, 0, 0, 8) for step in range(30)]
    assert all(batch.weight.tolist() == [1.0] * 6 + [3.0] * 2 for batch in batches)
    for data, rows in ((first, slice(0, 6)), (second, slice(6, 8))):  # each sample equally often, from its own source
        drawn = torch.cat([batch.x[rows] for batch in batches])
        counts = (drawn[:, None] == data.x[None]).all(2).sum(0)
        assert counts.tolist() == [len(drawn) // len(data)] * len(data)


def test_batches_do_not_depend_on_how_they_are_cut():
    settings = moons(12, share=0.5)
    stream = make_stream(settings, settings.data.load("train"), torch.device("cpu"))
    whole = stream(5, 1, 0, 8)
    parts = [stream(5, 1, *rows) for rows in ((0, 3), (3, 6), (6, 8))]
    for name in ("x", "weight"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    assert torch.equal(torch.cat([part.normal() for part in parts]), whole.normal())


def test_captions_of_two_lengths_are_joined(tmp_path):
    blocks = {"data": {"name": "digits", "captions": ["a {label}"]},
              "prior": {"data": {"name": "digits", "captions": ["some other {label}"]}}}  # fmt: skip
    settings = config.from_dict(TrainSettings, {**blocks, "batch": 4})
    batch = make_stream(settings, settings.data.load("train"), torch.device("cpu"))(0, 0, 0, 4)
    words = text.to_texts(batch.cond["text"])
    assert [w.startswith("some other ") for w in words] == [False, False, True, True]


@pytest.mark.parametrize(("argv", "message"), [
    (["--prior.data=digits"], r"prior.data: has samples \[1, 8, 8\]; the data are \[2\]; choose the same --data.size"),
    (["--prior.data=moons", "--prior.data.labels=false"], "prior.data: has the condition label not; both sources need"),
    (["--prior.data=moons", "--prior.share=0.01"], "prior.share: given 0.01, which is 0 of a batch of 4; needs 1 to 3"),
    (["--prior.share=0.2"], "share: has no effect without a second data source; give --prior.data"),
    (["--prior.prompts=x.txt"], "prompts: given x.txt, which has no effect without a weight; give --prior.preserve"),
    (["--prior.preserve=1"], "prior.preserve: given 1, but there is no adapter to switch off; give --lora.rank 8"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, capsys, argv, message):
    tiny = ["train", "--data=moons", "--data.n=20", "--backbone.width=8", "--batch=4", "--steps=1", "--device=cpu"]
    assert main([*tiny, f"--out={tmp_path}", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


# ----------------------------------------------------------------------------------------- the adapter switched off
def adapted(strength):
    torch.manual_seed(0)
    spec = Spec((1, 4, 4), {"text": Text(8)})
    net = DiT(width=8, depth=1, head_size=4).denoiser(spec)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn_like(p)
    nets = {"net": net}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    lora.adapt(nets, lora.LoRA(rank=2))
    with torch.no_grad():
        for p in net.parameters():
            p += strength * torch.randn_like(p)
    base = DiT(width=8, depth=1, head_size=4).denoiser(spec)
    base.load_state_dict(before)
    return nets, {"net": base}


@pytest.mark.parametrize("name", ["flow", "ddpm", "edm"])
def test_it_is_the_distance_to_the_base_under_generic_prompts(name):
    objective = OBJECTIVES[name]()
    prompts = text.to_bytes(["a dog", "cats"], 8)
    nets, base = adapted(0.3)
    preserve = Preservation(objective, 2.0, {"text": prompts})

    def batch():
        return Batch(torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)),
                     {"text": text.to_bytes(["mine"] * 6, 8)}, draw=Draw((3,), 0, 6))  # fmt: skip

    value = preserve(nets, batch())
    assert value.requires_grad
    # by hand: the same draws, the base as a network of its own
    mine = batch()
    rows = (mine.uniform() * 2).long()
    generic = replace(mine, cond={"text": prompts[rows]})
    sample = objective.sample_path(generic, {})
    inputs = objective.parametrization.inputs(objective.path, sample.x, sample.t)
    outs = [n["net"](*inputs, generic.cond) for n in (nets, base)]
    expected = ((objective.error_scale(sample.t, sample.x) * (outs[0] - outs[1])) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(value, 2 * expected)
    assert bool((value > 0).all())
    unchanged, _ = adapted(0.0)
    assert float(preserve(unchanged, batch()).abs().max()) == 0, "an adapter without a change is its base"


def test_an_adapter_that_is_switched_off_comes_back_and_keeps_its_gradients():
    nets, base = adapted(0.3)
    x, t = torch.randn(2, 1, 4, 4), torch.full((2,), 0.5)
    with lora.adapters_off(nets):
        off = nets["net"](x, t, {})
    on = nets["net"](x, t, {})
    torch.testing.assert_close(off, base["net"](x, t, {}))
    assert float((on - off).abs().max()) > 1e-3
    on.sum().backward()
    assert all(p.grad is not None for n, p in nets["net"].named_parameters() if "text" not in n)


@pytest.mark.slow
def test_training_logs_it_and_it_holds_the_adapter_back(tmp_path):
    tiny = ["--data=moons", "--data.n=64", "--backbone.width=8", "--batch=16", "--no-tensorboard", "--workers=0",
            "--device=cpu", "--sample-every=0", "--log-every=1"]  # fmt: skip
    assert main(["train", *tiny, "--steps=2", f"--out={tmp_path}/base"]) == 0
    adapter = [*tiny, f"--init={tmp_path}/base/latest", "--lora.rank=2", "--steps=30", "--lr=1e-2", "--warmup=0"]
    distance = {}
    for weight in (1e-6, 100):
        assert main(["train", *adapter, f"--prior.preserve={weight}", f"--out={tmp_path}/{weight}"]) == 0
        log = read_log(tmp_path / str(weight) / "latest")
        assert log[0]["denoise/preservation"] == 0, "the adapter begins without a change"
        distance[weight] = log[-1]["denoise/preservation"] / weight
    assert distance[100] < 0.1 * distance[1e-6]


# ------------------------------------------------------------------------------------------------- weights of places
def test_weights_of_places_are_those_of_the_squared_error():
    objective = OBJECTIVES["flow"]()
    x = torch.randn(3, 2, 4, 4)
    weight = torch.rand(3, 1, 8, 8)
    net = {"net": lambda z, t, c: torch.zeros_like(z)}
    sample = objective.sample_path(Batch(x, draw=Draw((0,), 0, 3)), {})
    pooled = weight.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    loss = objective.loss("denoise", net, Batch(x, draw=Draw((0,), 0, 3), place_weight=weight)).per_sample
    torch.testing.assert_close(loss, (pooled * (sample.x1 - sample.x0) ** 2).flatten(1).mean(1))


def test_data_with_weights_need_an_objective_that_takes_them():
    x = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    data = InMemory(x, {}, Spec((1, 4, 4)), Identity(), place_weight=x)
    for objective in ("vae", {"name": "edm", "augment": 0.1}):
        settings = config.from_dict(TrainSettings, {"objective": objective})
        with pytest.raises(ValueError, match=r"data\.alpha: given weight, but the loss of"):
            make_stream(settings, data, torch.device("cpu"))
    assert len(
        make_stream(config.from_dict(TrainSettings, {"objective": "edm"}), data, torch.device("cpu"))(0, 0, 0, 4)
    )
