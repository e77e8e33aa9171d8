"""Every optimizer: the step of its library, a state that survives a checkpoint, a guard, and shares where it allows."""

import copy
import math
from dataclasses import fields, replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from genkit import config
from genkit.backbones import BACKBONES, EDM2, MLP, DiT, UNet
from genkit.config.trust import UntrustedCodeError, require_trust
from genkit.core import Batch, Draw, Label, Spec
from genkit.core.weights import Fused, hidden_matrices
from genkit.data.codecs import Identity
from genkit.objectives import GAN, Flow
from genkit.training.loop import fit, initial_state, optimizer_step
from genkit.training.optimizers import OPTIMIZERS, AdamW, muon
from genkit.training.optimizers.groups import create_optimizer, read_phase_setting
from genkit.training.optimizers.modes import evaluation_weights
from genkit.training.optimizers.muon import Muon, orthogonalize
from genkit.training.optimizers.sharpness import SAM
from genkit.training.optimizers.state_files import flatten, optimizer_pieces, place, restore_optimizers
from genkit.training.settings import TrainSettings
from genkit.training.train import train
from tests.support.ranks import on_two_ranks

SPEC = Spec((2,), {"label": Label(3)})
PACKAGED = {name for name, cls in OPTIMIZERS.items() if cls.package == "pytorch-optimizer"}
ON_CPU = sorted(OPTIMIZERS.keys() - {"adamw-8bit"})
RATES = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}


def parse(name, *argv):
    """Settings with an optimizer, as a command line gives them."""
    if name in PACKAGED:
        pytest.importorskip("pytorch_optimizer")
    takes = OPTIMIZERS[name].takes("betas") if name in OPTIMIZERS else False
    rates = ["--lr=0.01", "--weight-decay=0.1", "--decay=all", *(["--betas", "0.8", "0.9"] if takes else [])]
    return config.parse(TrainSettings, ["--data=moons", f"--optimizer={name}", *rates, "--ema", "0.9", *argv])


def start(settings):
    """A state whose weights are none of them 0."""
    torch.manual_seed(0)
    nets = Flow().networks(MLP(width=8, depth=1), SPEC)
    with torch.no_grad():
        for p in nets["net"].parameters():
            p += 0.1 * torch.randn_like(p)
    return initial_state(Flow(), nets, settings)


def step(state, number, lr=0.01, bad=False):
    """A step with gradients that depend on its number only."""
    optimizer, parameters = state.optimizers["denoise"], list(state.nets["net"].parameters())
    for attempt in range(getattr(optimizer, "passes", 1)):
        if attempt:
            optimizer.perturb()
        torch.manual_seed(100 * number)
        for p in parameters:
            p.grad = torch.randn_like(p) * 0.1 + 0.01 * p.detach()
            if bad:
                p.grad.view(-1)[0] = math.nan
    optimizer_step(optimizer, parameters, lr, 0.0)


def weights(state):
    return {k: p.detach().clone() for k, p in state.nets["net"].named_parameters()}


def through_file(state, folder):
    """The optimizers' state, written to a file and read."""
    save_file({k: piece.rows for k, piece in optimizer_pieces(Flow(), state).items()}, folder / "optim.safetensors")
    return load_file(folder / "optim.safetensors")


# ------------------------------------------------------------------------------------------------- the registry
@pytest.mark.parametrize("name", ON_CPU)
def test_the_state_survives_a_checkpoint_to_the_last_bit(name, tmp_path):
    settings = parse(name)
    whole, resumed = start(settings), start(settings)
    for number in range(3):
        step(whole, number)
    with evaluation_weights(whole.optimizers.values()):
        resumed.nets["net"].load_state_dict(whole.nets["net"].state_dict())
        restore_optimizers(through_file(whole, tmp_path), Flow(), resumed)
    for number in range(3, 6):
        step(whole, number)
        step(resumed, number)
    assert all(torch.equal(v, weights(resumed)[k]) for k, v in weights(whole).items())
    ours, theirs = (optimizer_pieces(Flow(), state) for state in (whole, resumed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(piece.rows, theirs[k].rows) for k, piece in ours.items())


@pytest.mark.parametrize("name", ON_CPU)
def test_a_gradient_that_is_not_finite_changes_nothing(name):
    settings = parse(name)
    clean, hit = start(settings), start(settings)
    for number in range(3):
        step(clean, number)
        step(hit, number)
        step(hit, number + 10, bad=True)
    assert all(torch.equal(v, weights(hit)[k]) for k, v in weights(clean).items())
    ours, theirs = (optimizer_pieces(Flow(), state) for state in (clean, hit))
    assert all(torch.equal(piece.rows, theirs[k].rows) for k, piece in ours.items())


def library_optimizer(name, parameters):
    """The optimizer that a person would make of the library's class."""
    lr, betas, decay = RATES["lr"], RATES["betas"], RATES["weight_decay"]
    both = {"lr": lr, "betas": betas, "weight_decay": decay}
    torch_classes = {
        "adamw": lambda p: torch.optim.AdamW(p, **both),
        "adam": lambda p: torch.optim.Adam(p, **both),
        "sgd": lambda p: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=decay),
        "radam": lambda p: torch.optim.RAdam(p, **both, decoupled_weight_decay=True),
        "nadam": lambda p: torch.optim.NAdam(p, **both, decoupled_weight_decay=True),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr, weight_decay=decay),
    }
    if name in torch_classes:
        return torch_classes[name](parameters)
    library = pytest.importorskip("pytorch_optimizer")
    return {
        "lars": lambda p: library.LARS(p, lr, weight_decay=decay, momentum=0.9),
        "lamb": lambda p: library.Lamb(p, **both),
        "adabelief": lambda p: library.AdaBelief(p, **both),
        "shampoo": lambda p: library.Shampoo(p, lr, momentum=0.9, weight_decay=decay, preconditioning_compute_steps=10),
        "soap": lambda p: library.SOAP(p, **both),
        "lion": lambda p: library.Lion(p, **both),
        "prodigy": lambda p: library.Prodigy(p, **both, safeguard_warmup=True),
        "schedule-free": lambda p: library.ScheduleFreeAdamW(p, **both),
        "sam": lambda p: library.SAM(p, torch.optim.AdamW, rho=0.05, **both),
    }[name](parameters)


@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "muon"])
def test_steps_are_those_of_the_library(name):
    state = start(parse(name))
    net = copy.deepcopy(state.nets["net"])
    theirs = library_optimizer(name, list(net.parameters()))
    for number in range(3):
        step(state, number)

        def gradient(number=number):
            torch.manual_seed(100 * number)
            for p in net.parameters():
                p.grad = torch.randn_like(p) * 0.1 + 0.01 * p.detach()
            return 0.0

        gradient()
        theirs.step(gradient) if name == "sam" else theirs.step()
    for k, p in net.named_parameters():
        assert torch.allclose(weights(state)[k], p, rtol=1e-5, atol=1e-7), k


@pytest.mark.parametrize("name", [name for name, cls in OPTIMIZERS.items() if cls.shards])
def test_those_that_step_shares_treat_each_number_by_itself(name):
    settings = parse(name)
    whole, parts = nn.Parameter(torch.ones(6, 3)), [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, 3))]
    make = lambda p: settings.optimizer.create([{"params": p}], rates_of(settings), {})  # noqa: E731
    one, two = make([whole]), make(parts)
    for number in range(4):
        gradient = torch.randn(6, 3, generator=torch.Generator().manual_seed(number))
        whole.grad, parts[0].grad, parts[1].grad = gradient.clone(), gradient[:2].clone(), gradient[2:].clone()
        one.step()
        two.step()
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)


def rates_of(settings):
    from genkit.training.optimizers import PhaseRates

    return PhaseRates(settings.lr, settings.betas, settings.weight_decay)


def test_others_are_refused_where_weights_are_shared_among_ranks():
    settings = replace(TrainSettings(optimizer=OPTIMIZERS["muon"]()), parallel="fsdp")
    nets = Flow().networks(MLP(width=8), SPEC)
    with pytest.raises(ValueError, match=r"muon looks at whole weights.*adamw, adam, sgd"):
        create_optimizer(Flow().phases[0], nets, settings, sharding=object())  # type: ignore[arg-type]


def test_eight_bits_need_a_gpu():
    with pytest.raises(ValueError, match="adamw-8bit works on a GPU only"):
        start(TrainSettings(optimizer=OPTIMIZERS["adamw-8bit"]()))


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(OPTIMIZERS["lion"], "target", "no_such_package:Lion")
    with pytest.raises(ValueError, match=r"pip install pytorch-optimizer$") as e:
        start(TrainSettings(optimizer=OPTIMIZERS["lion"]()))
    assert "\n" not in str(e.value)


def test_betas_that_an_optimizer_has_not_are_refused():
    with pytest.raises(ValueError, match=r"betas: given .* but sgd has none"):
        start(TrainSettings(optimizer=OPTIMIZERS["sgd"](), betas=(0.5, 0.9)))


def test_weight_decay_that_an_optimizer_has_not_is_refused():
    rprop = config.parse(TrainSettings, ["--optimizer=torch.optim:Rprop"])
    start(rprop)
    with pytest.raises(ValueError, match=r"weight_decay: given 0.9, but Rprop has none; leave --weight-decay out"):
        start(replace(rprop, weight_decay=0.9))


def test_an_optimizer_brings_defaults_that_flags_override():
    parsed = config.parse(TrainSettings, ["--optimizer=schedule-free"])
    assert (parsed.lr, parsed.ema, type(parsed.schedule).__name__) == (2.5e-3, (), "ConstantRate")
    parsed = config.parse(TrainSettings, ["--optimizer=schedule-free", "--lr=1", "--schedule=cosine", "--ema", "0.9"])
    assert (parsed.lr, parsed.ema, type(parsed.schedule).__name__) == (1.0, (0.9,), "CosineDecay")
    assert TrainSettings().optimizer == AdamW()


# -------------------------------------------------------------------------------------------------------- Muon
@pytest.mark.parametrize("fast", [False, True])
def test_orthogonalisation_keeps_singular_vectors_and_evens_out_singular_values(fast, monkeypatch):
    monkeypatch.setattr(muon, "has_fast_bf16", lambda device: fast)
    x = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalize(x, 5)
    assert y.dtype == (torch.bfloat16 if fast else torch.float32)  # emulated bf16 takes many times longer
    y = y.float()
    middle = u.mT @ y @ vh.mT
    assert torch.allclose(middle, torch.diag_embed(middle.diagonal(dim1=1, dim2=2)), atol=0.05)
    assert float(torch.linalg.svdvals(y).min()) > 0.6
    assert float(torch.linalg.svdvals(y).max()) < 1.3


@pytest.mark.parametrize("fused", [Fused(1), Fused(3), Fused(3, interleaved=True)])
@pytest.mark.parametrize("shape", [(12, 5), (6, 4, 3, 3)])
def test_muon_is_torchs_on_each_matrix_of_a_weight(fused, shape, monkeypatch):
    monkeypatch.setattr(muon, "has_fast_bf16", lambda device: True)  # as torch's, which knows bf16 only
    p = nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
    rows = p.detach().clone().flatten(1)
    split = [rows[i :: fused.parts] for i in range(fused.parts)] if fused.interleaved else rows.chunk(fused.parts)
    matrices = [nn.Parameter(m.clone()) for m in split]
    ours = Muon([{"params": [p]}], {id(p): fused}, rates_of(replace(TrainSettings(), lr=0.02, weight_decay=0.1)))
    theirs = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for number in range(3):
        p.grad = torch.randn(*shape, generator=torch.Generator().manual_seed(number))
        rows = p.grad.flatten(1)
        split = [rows[i :: fused.parts] for i in range(fused.parts)] if fused.interleaved else rows.chunk(fused.parts)
        for m, gradient in zip(matrices, split, strict=True):
            m.grad = gradient.clone()
        ours.step()
        theirs.step()
    rows = p.detach().flatten(1)
    split = [rows[i :: fused.parts] for i in range(fused.parts)] if fused.interleaved else rows.chunk(fused.parts)
    for m, mine in zip(matrices, split, strict=True):
        assert torch.allclose(m, mine, atol=2e-3)  # products in bf16


def test_muon_steps_the_rest_by_adamw():
    state, adamw = start(parse("muon")), start(parse("adamw"))
    step(state, 0)
    step(adamw, 0)
    hidden = {m.name.removeprefix("net.") for m in hidden_matrices(state.nets)}
    assert hidden
    for k, v in weights(state).items():
        assert torch.equal(v, weights(adamw)[k]) == (k not in hidden), k


NETWORKS = {
    "mlp": (MLP(width=8, depth=1), Spec((2,), {"label": Label(3)})),
    "unet": (UNet(width=8, mults=(1, 2), attention=(8,)), Spec((1, 8, 8), {"label": Label(3)})),
    "dit": (DiT(width=16, depth=1, head_size=8, registers=2, mlp="swiglu"), Spec((1, 8, 8), {"label": Label(3)})),
    "edm2": (EDM2(width=8, mults=(1, 2), attention=(8,)), Spec((1, 8, 8), {"label": Label(3)})),
}


@pytest.mark.parametrize("name", sorted(BACKBONES.keys() - {"diffusers"}))
def test_families_declare_fused_weights_and_edges(name):
    """Whatever maps to several chunks is declared; the layers that touch the sample are none of the hidden matrices."""
    backbone, spec = NETWORKS[name]
    net = backbone.denoiser(spec)
    matrices = {m.name: m for m in hidden_matrices({"net": net})}
    modules = dict(net.named_modules())
    for key, m in matrices.items():
        last = key.removesuffix(".weight").rpartition(".")[2]
        chunks = {"kv": 3, "qkv": 3, "emb_last": 2}.get(last)
        if name == "unet" and last == "emb":
            chunks = 2
        if last == "emb" and name in ("dit", "mlp"):
            chunks = 6 if name == "dit" else 3
        if name == "dit" and last == "layer1" and ".blocks." in key:
            chunks = 2
        assert m.fused.parts == (chunks or 1), key
        assert m.fused.interleaved == (name == "edm2" and last == "qkv")
        assert not isinstance(modules[key.removeprefix("net.").removesuffix(".weight")], nn.Embedding)
        assert not key.endswith((".first.weight", "last.weight", "patches.weight")) or key.endswith("emb_last.weight")
    assert len(matrices) > 3


# --------------------------------------------------------------------------------- two gradients, two sets of weights
def test_the_second_gradient_is_taken_up_the_slope():
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SAM([{"params": [p]}], rates_of(TrainSettings()), rho=0.5, adaptive=False)
    p.grad = torch.tensor([30.0, 40.0])
    optimizer.perturb()
    assert torch.allclose(p, torch.tensor([3.3, 4.4]))
    assert p.grad is None
    p.grad = torch.tensor([1.0, 1.0])
    optimizer.step()
    assert torch.allclose(p, torch.tensor([2.999, 3.999]))


def test_training_takes_both_gradients_of_the_same_batch():
    settings = replace(parse("sam"), steps=2, batch=8, micro_batch=4, warmup=0, precision="fp32", ema=())
    state, seen, moved = start(settings), [], []
    optimizer = state.optimizers["denoise"]
    before = optimizer.perturb
    optimizer.perturb = lambda: (moved.append(1), before())

    def stream(number, draw, first, last):
        seen.append((number, draw, first, last))
        draws = Draw((1, number, draw), first, last)
        return Batch(draws.normal(2), {"label": torch.arange(first, last) % 3}, draw=draws, step=number)

    fit(Flow(), state, stream, Identity(), settings, Accelerator(cpu=True))
    assert len(moved) == 2
    assert seen == [(s, 0, first, first + 4) for s in range(2) for _ in range(2) for first in (0, 4)]


@pytest.mark.parametrize("setting", ["--objective.time-distribution=loss-aware", "--objective=vq"])
def test_what_networks_gather_of_a_batch_is_gathered_once(setting, tmp_path):
    """Times that follow the losses, and a codebook, count samples; the second gradient of SAM is of the same ones."""
    vq = setting == "--objective=vq"
    options = (
        ["--data=digits", "--backbone.width=8"] if vq else ["--data=moons", "--backbone=mlp", "--backbone.width=8"]
    )
    counted = []
    for optimizer in ("adamw", "sam"):
        argv = [*options, setting, "--backbone.width=8", f"--optimizer={optimizer}", "--steps=1", "--batch=16",
                "--micro-batch=8", "--sample-every=0", "--device=cpu", "--no-tensorboard"]  # fmt: skip
        run = train(config.parse(TrainSettings, argv), out=str(tmp_path))
        stored = load_file(run.directory / "checkpoints/step-0000001/nets.safetensors")
        found = {k: v for k, v in stored.items() if k.endswith(("codebook.counts", "num_losses"))}
        assert found
        counted.append(found)
    for name, value in counted[0].items():
        assert value.sum() > 0
        assert torch.equal(value, counted[1][name])


def test_evaluation_sees_the_average_of_a_schedule_free_optimizer():
    state = start(parse("schedule-free"))
    for number in range(3):
        step(state, number)
    trained, optimizer = weights(state), state.optimizers["denoise"]
    with evaluation_weights(state.optimizers.values()):
        for k, p in state.nets["net"].named_parameters():
            # y = beta x + (1 - beta) z (Defazio et al. 2024, eq. 3)
            assert torch.allclose(0.8 * p + 0.2 * optimizer.state[p]["z"], trained[k], atol=1e-6)
            assert not torch.equal(p, trained[k])
    assert all(torch.equal(v, trained[k]) for k, v in weights(state).items())
    step(state, 3)


class Doubled(torch.optim.SGD):
    """Evaluates at twice the weights."""

    def eval(self):
        torch._foreach_mul_([p for group in self.param_groups for p in group["params"]], 2.0)

    def train(self):
        pass


def test_hooks_have_the_weights_of_evaluation_and_training_goes_on_at_its_own(tmp_path):
    settings = parse("tests.training.test_optimizers:Doubled", "--optimizer.momentum=0.5")
    whole, resumed = start(settings), start(settings)
    step(whole, 0)
    trained = weights(whole)
    with torch.no_grad(), evaluation_weights(whole.optimizers.values()):
        assert all(torch.equal(p, 2 * trained[k]) for k, p in whole.nets["net"].named_parameters())
        resumed.nets["net"].load_state_dict(whole.nets["net"].state_dict())
        stored = through_file(whole, tmp_path)
    restore_optimizers(stored, Flow(), resumed)
    assert all(torch.equal(v, weights(state)[k]) for state in (whole, resumed) for k, v in trained.items())


# ------------------------------------------------------------------------------------------- phases, other classes
def test_a_phase_has_a_rate_of_its_own():
    settings = config.parse(TrainSettings, ["--objective=gan", "--phase-settings", "discriminator.lr=4e-4",
                                            "discriminator.betas=0,0.9", "discriminator.weight-decay=0.1"])  # fmt: skip
    nets = GAN().networks(UNet(width=8), Spec((1, 8, 8), {}))
    state = initial_state(settings.objective, nets, settings)
    own, other = (state.optimizers[k].param_groups[0] for k in ("discriminator", "generator"))
    assert (own["lr"], own["betas"], own["weight_decay"]) == (4e-4, (0.0, 0.9), 0.1)
    assert (other["lr"], other["betas"], other["weight_decay"]) == (settings.lr, settings.betas, 0.0)


@pytest.mark.parametrize("text", ["discriminator", "discriminator.lr", "lr=1", "discriminator.steps=3", ".lr=1",
                                  "discriminator.lr=-1", "discriminator.betas=0.5"])  # fmt: skip
def test_wrong_settings_of_a_phase_are_one_line(text):
    with pytest.raises(ValueError, match="phase_settings") as e:
        read_phase_setting(text)
    assert "\n" not in str(e.value)


def test_an_unknown_phase_is_refused():
    with pytest.raises(ValueError, match="the phases are denoise"):
        start(TrainSettings(phase_settings=("critic.lr=1",)))


def test_another_class_of_torchs_kind_has_its_arguments_as_options():
    settings = parse("torch.optim:RMSprop", "--optimizer.momentum=0.5")
    assert config.from_dict(TrainSettings, config.dump(settings)) == settings
    state = start(settings)
    net = copy.deepcopy(state.nets["net"])
    theirs = torch.optim.RMSprop(net.parameters(), 0.01, momentum=0.5, weight_decay=0.1)
    step(state, 0)
    torch.manual_seed(0)
    for p in net.parameters():
        p.grad = torch.randn_like(p) * 0.1 + 0.01 * p.detach()
    theirs.step()
    assert all(torch.allclose(weights(state)[k], p) for k, p in net.named_parameters())


@pytest.mark.parametrize(("name", "words"), [("torch.optim:LBFGS", "closure"), ("torch.nn:Linear", "dataclass")])
def test_classes_that_cannot_be_stepped_are_refused(name, words):
    with pytest.raises(ValueError, match=words):
        config.parse(TrainSettings, [f"--optimizer={name}"])


def test_a_stored_run_does_not_import_an_optimizer_untrusted():
    tree = config.dump(TrainSettings()) | {"optimizer": {"name": "somebody_elses.code:Fast"}}
    with pytest.raises(UntrustedCodeError, match="--trust"):
        require_trust(TrainSettings, tree, "config.yaml")


class Keeper(torch.optim.Optimizer):
    """Counts its steps in the group, and keeps a list, a transposed matrix and a mapping for each parameter."""

    def __init__(self, params: "Unknown", lr=0.1, weight_decay=0.0, delay=0, depth: "int" = 1):  # type: ignore[name-defined]
        super().__init__(params, {"lr": lr, "count": 0, "sum": None})

    def step(self, closure=None):  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
            group["sum"] = torch.full((2,), float(group["count"]))
            for p in group["params"]:
                kept = self.state[p]
                kept["past"] = [*kept.get("past", []), p.grad.clone(), group["count"]]
                kept["turned"] = p.grad.clone().flatten(1).T if p.ndim > 1 else None
                kept["sides"] = {0: p.grad.clone(), 7: {"name": group["count"]}}


def test_whatever_an_optimizer_keeps_comes_back(tmp_path):
    settings = parse("tests.training.test_optimizers:Keeper")
    whole, resumed = start(settings), start(settings)
    step(whole, 0)
    step(whole, 1)
    restore_optimizers(through_file(whole, tmp_path), Flow(), resumed)
    ours, theirs = (state.optimizers["denoise"] for state in (whole, resumed))
    assert theirs.param_groups[0]["count"] == 2
    assert torch.equal(theirs.param_groups[0]["sum"], torch.full((2,), 2.0))
    for p, q in zip(whole.nets["net"].parameters(), resumed.nets["net"].parameters(), strict=True):
        a, b = ours.state[p], theirs.state[q]
        assert [len(a["past"]), a["past"][1], a["past"][3]] == [len(b["past"]), b["past"][1], b["past"][3]] == [4, 1, 2]
        assert torch.equal(a["past"][2], b["past"][2])
        assert torch.equal(a["sides"][0], b["sides"][0])
        assert b["sides"].keys() == {0, 7}
        assert b["sides"][7] == {"name": 2}
        assert (a["turned"] is None) == (b["turned"] is None)
        if a["turned"] is not None:
            assert torch.equal(a["turned"], b["turned"])
            assert a["turned"].stride() == b["turned"].stride()


def test_a_state_that_no_file_can_hold_is_refused():
    with pytest.raises(ValueError, match="its state a is a set"):
        flatten({1}, "a", {})
    with pytest.raises(ValueError, match="its state a has keys other than texts"):
        flatten({1.5: 2}, "a", {})


def test_slots_of_a_single_number_are_where_it_is_but_the_count_of_steps():
    """As torch's optimizers that are not fused need them on an accelerator."""
    number, matrix = (nn.Parameter(torch.empty(shape, device="meta")) for shape in ((), (2, 2)))
    slot, count = torch.tensor(1.0), torch.tensor(3.0)
    assert place(slot, {}, number).device.type == "meta"
    assert place(count, {}, number, counts=True) is count
    assert place(count, {}, matrix) is count  # such as a norm
    assert place(count, {"fused": True}, matrix, counts=True).device.type == "meta"


def test_whole_numbers_without_annotation_stand_for_any_number():
    settings = parse("tests.training.test_optimizers:Keeper", "--optimizer.delay=0.9", "--optimizer.depth=2")
    assert (settings.optimizer.delay, settings.optimizer.depth) == (0.9, 2)
    assert config.from_dict(TrainSettings, config.dump(settings)) == settings
    whole = parse("tests.training.test_optimizers:Keeper", "--optimizer.delay=3").optimizer
    assert type(whole.delay) is int
    with pytest.raises(ValueError, match=r"depth.*integer"):
        parse("tests.training.test_optimizers:Keeper", "--optimizer.depth=0.5")


def test_options_are_arguments_of_the_class():
    for name, cls in OPTIMIZERS.items():
        assert all(f.name != "lr" for f in fields(cls)), name


# ----------------------------------------------------------------------------------------------------------- ranks
def trained_on(accelerator, name):
    settings = replace(parse(name), steps=4, batch=8, warmup=0, precision="fp32", ema=())
    state = start(settings)

    def stream(number, draw, first, last):
        draws = Draw((1, number, draw), first, last)
        return Batch(draws.normal(2), {"label": torch.arange(first, last) % 3}, draw=draws, step=number)

    fit(Flow(), state, stream, Identity(), settings, accelerator)
    return weights(state)


@pytest.mark.slow
@pytest.mark.parametrize("names", [ON_CPU])
def test_two_ranks_are_one_process(names):
    pytest.importorskip("pytorch_optimizer")
    ranks = on_two_ranks(lambda accelerator: {name: trained_on(accelerator, name) for name in names})
    for name in names:
        whole = trained_on(Accelerator(cpu=True), name)
        # Muon's products are in bf16, Lion's steps are signs; SOAP's first gradients do not fill the space, and
        # rounding chooses the eigenvectors of the rest of it
        close = {"muon": 2e-3, "lion": 2e-2, "soap": 5e-2}.get(name, 2e-5)
        assert all(torch.equal(v, ranks[1][name][k]) for k, v in ranks[0][name].items()), name
        for k, v in whole.items():
            assert torch.allclose(v, ranks[0][name][k], atol=close), (name, k)
