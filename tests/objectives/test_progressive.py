"""Progressive distillation: one step of the target is two of the teacher's; rounds follow; students agree."""

import pytest
import torch

from genkit import distill, load, train
from genkit.core import Batch, Draw, Prediction
from genkit.diffusion.guidance import APG, classifier_free
from genkit.diffusion.paths import PATHS, VP, Cosine, chart
from genkit.diffusion.samplers import bind
from genkit.objectives import DDPM, EDM, Flow, ProgressiveDistillation
from genkit.objectives.distillation.progressive import GuidedByScale, mean_velocity
from genkit.objectives.distillation.student import ScaledDenoiser, rows_of, step_times
from genkit.training.sampling import Sampling
from tests.support.exact import F64, ExactDenoiser, Mixture, three

MIXTURE = three()
STEPS = 5


def pairs_of_steps(path, rows=40):
    """Points of the path, and the three times of two steps of 2 * STEPS, at every place of the grid."""
    index = 2 * (torch.arange(rows) % STEPS)
    times = tuple(rows_of(step_times(path, 2 * STEPS), index + k, torch.zeros(rows, 2, dtype=F64)) for k in range(3))
    x0, k = MIXTURE.sample(rows, seed=3)
    noise = torch.randn(rows, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    a, s = path.alpha(times[0])[:, None], path.sigma(times[0])[:, None]
    return a * x0 + s * noise, times, {"label": k}


@pytest.mark.parametrize("name", PATHS)
def test_for_normal_data_the_target_is_the_closed_form(name):
    """Data N(0, c^2): in the chart ``v = u (tau - (1 - tau) c^2) / ((1 - tau)^2 c^2 + tau^2)``, so that a step of DDIM
    multiplies u by a number."""
    path, c = PATHS[name](), 0.7
    x, times, _ = pairs_of_steps(path)
    (t0, scale), (t1, _), (t2, _) = (chart(path, t) for t in times)
    slope = lambda t: (t - (1 - t) * c**2) / ((1 - t) ** 2 * c**2 + t**2)  # noqa: E731
    factor = (1 - (t0 - t1) * slope(t0)) * (1 - (t1 - t2) * slope(t1))
    expected = (x / scale[:, None]) * ((1 - factor) / (t0 - t2))[:, None]
    one = torch.ones(1, dtype=F64)
    bell = ExactDenoiser(Mixture(one, torch.zeros(1, 2, dtype=F64), c**2 * torch.eye(2, dtype=F64)[None]), path)
    assert torch.allclose(mean_velocity(bell, x, times, {}), expected, rtol=1e-11, atol=1e-12)


class OneStep:
    """A student that has learned its target at the points where it is asked."""

    def __init__(self, teacher, times):
        self.teacher, self.times, self.path = teacher, times, teacher.path

    def __call__(self, x, t, cond):
        velocity = mean_velocity(self.teacher, x, self.times, cond)
        tau, scale = (v[:, None] for v in chart(self.path, t))
        return Prediction(x / scale - tau * velocity, x / scale + (1 - tau) * velocity)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", PATHS)
def test_one_step_of_the_student_is_two_of_the_teacher(name, scale):
    """Against genkit's own DDIM sampler on the same times, guided or not, for a mixture, also in the last step."""
    teacher = classifier_free(scale)(ExactDenoiser(MIXTURE, PATHS[name]()))
    x, times, cond = pairs_of_steps(teacher.path)
    for i in range(0, 2 * STEPS, 2):
        row = slice(i // 2, i // 2 + 1)
        grid, label = torch.stack([t[row] for t in times]).flatten(), {"label": cond["label"][row]}
        z = x[row] / teacher.path.sigma(grid[:1])  # a sampler begins at sigma z
        two = bind("ddim", grid)(teacher)(z, label)
        one = bind("ddim", grid[::2])(OneStep(teacher, grid.split(1)))(z, label)
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12), i
        assert not torch.allclose(bind("ddim", grid[::2])(teacher)(z, label), two, atol=1e-4)


@pytest.mark.parametrize("of", [Flow(), Flow(path=Cosine(), prediction="x0"), DDPM(), DDPM(prediction="v"), EDM()],
                         ids=lambda o: f"{type(o).__name__}-{o.prediction}")  # fmt: skip
def test_the_loss_is_the_error_of_the_velocity_at_the_students_own_times(of):
    """For networks that answer 0, written out with the objective's own denoiser; and by the round of the step."""
    objective = ProgressiveDistillation(of=of, teacher_steps=8, steps=2, round_steps=10)
    nets = {name: (lambda x, t, c, k=k: 0 * x + k) for k, name in enumerate(("net", "teacher"))}
    x0 = torch.randn(30, 2, dtype=F64)
    denoise = of.denoiser(nets["net"])
    for step, steps in ((0, 4), (9, 4), (10, 2), (500, 2), (None, 2)):
        loss = objective.loss("distill", nets, Batch(x0, draw=Draw((2,), 0, 30), step=step))
        assert float(loss.logs["steps"]) == steps
        draw = Draw((2,), 0, 30)
        index = 2 * (draw.uniform() * steps).floor().long()
        times = [step_times(denoise.path, 2 * steps)[index + k] for k in range(3)]
        x = denoise.path.alpha(times[0])[:, None] * x0 + denoise.path.sigma(times[0])[:, None] * draw.normal(2)
        target = mean_velocity(of.denoiser(nets["teacher"]), x, times, {})
        error = denoise(x, times[0], {}).velocity - target
        linear = denoise(torch.ones_like(x), times[0], {}).velocity - of.denoiser(lambda x, t, c: 0 * x + 1)(
            torch.ones_like(x), times[0], {}).velocity  # fmt: skip
        bounded = error * (20 / linear.abs()).clamp(max=1)
        assert torch.allclose(loss.per_sample.double(), bounded.square().mean(1), rtol=1e-4)


def test_a_scale_for_each_sample_is_guidance_by_it():
    x, times, cond = pairs_of_steps(VP())
    scale = torch.linspace(1, 5, len(x), dtype=F64)
    denoise = ExactDenoiser(MIXTURE, VP())
    got = GuidedByScale(denoise)(x, times[0], {**cond, "guidance": scale})
    for i in (0, 7, 39):
        row = slice(i, i + 1)
        one = classifier_free(float(scale[i]))(denoise)(x[row], times[0][row], {"label": cond["label"][row]})
        assert torch.allclose(got.x0[row], one.x0, rtol=1e-12)
        assert torch.allclose(got.x1[row], one.x1, rtol=1e-10)
    seen = []
    inner = type("Spy", (), {"path": VP(), "__call__": lambda self, x, t, c: seen.append(c["guidance"])})()
    for given in ({"guidance": torch.tensor([1.0, 2.0, 4.0])}, {}):
        ScaledDenoiser(inner)(torch.zeros(3, 2), torch.ones(3), given)
    assert seen[0].tolist() == [0, 0.5, 0.75]
    assert seen[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", [{"teacher_guidance": 3.0}, {"guidance": 4.0}])
def test_only_the_first_teacher_is_guided(options):
    """Later teachers are students, whose own predictions are guided already."""
    objective = ProgressiveDistillation(of=Flow(), teacher_steps=4, steps=1, **options)
    scale = torch.tensor([3.0, 3.0], dtype=F64)
    net = lambda x, t, cond: (1.0 + cond["label"][:, None] * cond.get("keep", torch.ones(len(x)))[:, None]) * x  # noqa: E731
    x, t, cond = torch.ones(2, 2, dtype=F64), torch.full((2,), 0.5, dtype=F64), {"label": torch.tensor([1, 2])}
    given = {**cond, "guidance": scale} if "guidance" in options else cond
    plain, guided = (d(x, t, cond).x0 for d in (Flow().denoiser(net), classifier_free(3.0)(Flow().denoiser(net))))
    first, second = (objective.guided_teacher(net, number)(x, t, given).x0 for number in (0, 1))
    assert float((plain - guided).abs().min()) > 0.5
    torch.testing.assert_close(first, guided)
    torch.testing.assert_close(second, plain)


# --------------------------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A flow of eight classes in the plane."""
    out = tmp_path_factory.mktemp("base")
    return train(
        data={"name": "8gaussians", "n": 2000}, backbone={"name": "mlp", "width": 32, "depth": 2}, steps=200, batch=128,
        workers=0, tensorboard=False, sample_every=0, out=str(out), ema=(0.99,),
    )  # fmt: skip


def student_of(base, tmp_path, steps=180, round_steps=60, batch=128, **options):
    objective = {"name": "progressive-distillation", "teacher_steps": 8, "round_steps": round_steps, **options}
    return train(
        init=str(base.directory), objective=objective, steps=steps, batch=batch, workers=0, tensorboard=False,
        sample_every=0, out=str(tmp_path), ema=(0.95,), save_every=30, keep_checkpoints=10,
    )  # fmt: skip


def missed(student, base, **how):
    """The share of the difference between 8 steps and 1 that the student does not make up."""
    many, one = (base.sample(256, Sampling(sampler="ddim", steps=k, **how)).x for k in (8, 1))
    drawn = student.sample(256)
    assert drawn.network_rows == 1
    return float((drawn.x - many).square().mean() / (one - many).square().mean())


def test_a_student_agrees_with_the_steps_of_its_teacher(base, tmp_path):
    run = student_of(base, tmp_path)
    assert run.config.data == base.config.data
    assert run.config.backbone == base.config.backbone
    assert run.objective.of == base.objective
    assert missed(run, base) < 0.2
    # in a round, a checkpoint draws in as many steps as it has learned
    assert [load(run.directory, step=k, device="cpu").sample(4).network_rows for k in (30, 60, 90, 120, 180)] == [
        4, 2, 2, 1, 1]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*(load(run.directory, step=60, ema="none").nets[k].parameters()
                                                  for k in ("net", "teacher")), strict=True))  # fmt: skip
    with pytest.raises(ValueError, match="guidance: has no effect on ProgressiveDistillation"):
        run.sample(4, guidance=2.0)
    with pytest.raises(ValueError, match="steps: has no effect"):
        run.sample(4, steps=2)
    with pytest.raises(ValueError, match="steps cannot be distilled"):
        student_of(run, tmp_path)


@pytest.mark.slow
def test_guidance_of_the_teacher_becomes_part_of_the_student(base, tmp_path):
    fixed = student_of(base, tmp_path, teacher_guidance=2.5)
    assert missed(fixed, base, guidance=2.5) < 0.2
    taken = student_of(base, tmp_path, steps=900, round_steps=300, guidance=4.0)
    many = {w: base.sample(256, Sampling(sampler="ddim", steps=8, guidance=w)).x for w in (1.0, 2.5)}
    effect = (many[1.0] - many[2.5]).square().mean()
    for scale in (1.0, 2.5):
        drawn = taken.sample(256, guidance=scale)
        assert drawn.network_rows == 1
        assert float((drawn.x - many[scale]).square().mean() / effect) < 0.3, scale
    with pytest.raises(ValueError, match=r"guidance: given 5\.0; allowed 1 to 4"):
        taken.sample(4, guidance=5.0)


@pytest.mark.parametrize(("options", "says"), [
    ({"teacher_steps": 6, "steps": 2}, "differ by a power of 2"),
    ({"teacher_steps": 4, "steps": 4}, "try teacher_steps 8"),
    ({"teacher_guidance": 2.0, "guidance": 3.0}, "has no effect where the scale is an input"),
    ({"of": Flow(cond_dropout=0.0), "guidance": 3.0}, "nothing to guide away from"),
    ({"of": Flow(cond_dropout=0.0), "teacher_guidance": 3.0}, "nothing to guide away from"),
    ({"of": ProgressiveDistillation()}, "steps cannot be distilled"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        ProgressiveDistillation(**options)


def test_a_run_to_learn_from_is_needed_and_must_be_what_of_says(base, tmp_path):
    how = {"steps": 1, "out": str(tmp_path), "workers": 0, "tensorboard": False, "device": "cpu"}
    name = "progressive-distillation"
    with pytest.raises(ValueError, match="learns from a trained run; name it with --init RUN"):
        train(objective=name, data="moons", **how)
    with pytest.raises(ValueError, match="copies whole networks"):
        train(objective=name, init=str(base.directory), lora={"rank": 2}, **how)
    with pytest.raises(ValueError, match="differs from the objective of the run, a Flow; leave"):
        train(objective={"name": name, "of": {"name": "flow", "path": "cosine"}}, init=str(base.directory), **how)
    adapter = distill(base, guidance=(1, 4), rank=2, steps=1, batch=4, out=str(tmp_path / "a"))
    with pytest.raises(ValueError, match="given GuidanceDistillation, whose steps cannot be distilled"):
        train(objective=name, init=str(adapter.directory), **how)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.fixture(scope="module")
def hardly_trained(tmp_path_factory):
    return train(data={"name": "8gaussians", "n": 64}, backbone={"name": "mlp", "width": 8}, steps=1, batch=8,
                 workers=0, tensorboard=False, sample_every=0, out=str(tmp_path_factory.mktemp("short")))  # fmt: skip


def short_student(base, **changes):
    return train(init=str(base.directory), objective={"name": "progressive-distillation", "guidance": 3.0},
                 backbone=base.config.backbone, data=base.config.data, steps=1, batch=8, workers=0, tensorboard=False,
                 sample_every=0, out=str(base.directory.parent), **changes)  # fmt: skip


@pytest.mark.parametrize("idle", [{"guidance_rule": APG()}, {"guidance_passes": "apart"}, {"classifier_scale": 2.0},
                                  {"autoguide": "ema:none"}])  # fmt: skip
def test_options_of_guidance_that_a_learned_scale_passes_over_are_refused(hardly_trained, idle):
    run = short_student(hardly_trained)
    assert run.sample(2, guidance=2.0).x.shape == (2, 2)
    with pytest.raises(ValueError, match="has no effect"):
        run.sample(2, guidance=2.0, **idle)


def test_an_optimizer_with_an_average_of_its_own_is_refused(hardly_trained):
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ValueError, match="optimizer: schedule-free averages the weights of the whole training"):
        short_student(hardly_trained, optimizer="schedule-free")
