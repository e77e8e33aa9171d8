"""Editing with any denoiser: linear inverse problems as guidance, and SDEdit.

The measurement is ``y = A x0 + sigma_y n``. Bayes' rule adds ``grad log p(y | x_t)`` to the score, which moves the
expected data by ``sigma^2 / alpha`` times that gradient (Tweedie's formula, on any path). :func:`pigdm` and :func:`dps`
differ in the form that they assume of ``p(x0 | x_t)``; both differentiate through the denoiser. They are ``Denoiser ->
Denoiser``, so every sampler draws from the posterior, on the paths of diffusion and of flow alike, with other guidance
or without:

    measurement = measure(Mask(mask), x0, sigma_y=0.05)
    bind("heun", 50, compose(classifier_free(2.0), pigdm(measurement)))(denoise)(z, cond)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from genkit.core import NO_COND, Cond, Denoiser, Guidance, Noise, Prediction, expand
from genkit.diffusion.checks import require
from genkit.diffusion.guidance import LAST, Wrapped
from genkit.diffusion.paths import chart, mix, require_diffusion, shared_time, times_at, within_path
from genkit.diffusion.posterior import replace_endpoints
from genkit.diffusion.samplers import SAMPLERS, Callback

T = TypeVar("T")


def once(owner: object, name: str, like: Tensor, make: Callable[[], T]) -> T:
    """``make()``, computed once for each dtype and device of ``like``, and kept with its frozen ``owner``.

    A constant is then copied to a device once, and not at every step, where the host would wait.
    """
    kept = vars(owner).setdefault("_constants", {})
    key = (name, like.dtype, like.device)
    if key not in kept:
        kept[key] = make()
    return kept[key]


# ------------------------------------------------------------------------------------------------ operators
class Operator(ABC):
    """A linear map A from samples ``[B, *S]`` to measurements ``[B, *M]``."""

    @abstractmethod
    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """M for samples of shape S. ``ValueError`` if the operator does not fit them."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``A x``."""

    @abstractmethod
    def transpose(self, y: Tensor) -> Tensor:
        """``A^T y``."""

    @abstractmethod
    def solve(self, y: Tensor, r2: Tensor, s2: float) -> Tensor:
        """``(r2 A A^T + s2 I)^-1 y`` with r2 ``[B]`` above 0; by the pseudo-inverse if it is singular (s2 = 0)."""


@dataclass(frozen=True, eq=False)
class Mask(Operator):
    """Inpainting: the entries of a sample at which ``mask`` is True; the others become 0."""

    mask: Tensor
    """Bool ``[*S]``"""

    def __post_init__(self) -> None:
        require("mask", self.mask.dtype, "torch.bool: True where a sample is known", self.mask.dtype == torch.bool)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        given = tuple(self.mask.shape)
        require("mask", f"shape {given}", f"the shape of a sample, {tuple(shape)}", given == tuple(shape))
        return shape

    def forward(self, x: Tensor) -> Tensor:
        return x * once(self, "mask", x, lambda: self.mask.to(x))

    def transpose(self, y: Tensor) -> Tensor:
        return self.forward(y)

    def solve(self, y: Tensor, r2: Tensor, s2: float) -> Tensor:
        return self.forward(y) / (expand(r2, y) + s2)  # A A^T = 1 at measured numbers


@dataclass(frozen=True)
class Average(Operator):
    """Super-resolution: the mean of each ``factor x factor`` block of an image ``[C, H, W]``."""

    factor: int = 2
    """side of a block, in pixels"""

    def __post_init__(self) -> None:
        require("factor", self.factor, "1 or more", self.factor >= 1)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        f = self.factor
        require("factor", f"{f} for samples of shape {tuple(shape)}", "a divisor of the height and width of images",
                len(shape) == 3 and all(n % f == 0 for n in shape[1:]))  # fmt: skip
        return shape[0], shape[1] // f, shape[2] // f

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, self.factor)

    def transpose(self, y: Tensor) -> Tensor:
        return self.enlarge(y) / self.factor**2

    def enlarge(self, y: Tensor) -> Tensor:
        """Each number as a block: the pseudo-inverse, and a picture of a measurement."""
        return y.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)

    def solve(self, y: Tensor, r2: Tensor, s2: float) -> Tensor:
        return y / (expand(r2, y) / self.factor**2 + s2)  # A A^T = 1 / factor^2


@dataclass(frozen=True, eq=False)
class Blur(Operator):
    """Deblurring: circular convolution of images ``[C, H, W]`` with a kernel, by Fourier transform."""

    kernel: Tensor
    """``[h, w]``"""

    @classmethod
    def gaussian(cls, width: float = 1.0) -> Blur:
        """A Gaussian kernel of this standard deviation in pixels, cut at three of them, with sum 1."""
        require("width", width, "above 0", 0 < width < math.inf)
        reach = math.ceil(3 * width)
        bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / width) ** 2)
        return cls(torch.outer(bell, bell) / bell.sum() ** 2)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        require("blur", f"samples of shape {tuple(shape)}", "images [C, H, W]", len(shape) == 3)
        return shape

    def transfer(self, like: Tensor) -> Tensor:
        """The kernel's Fourier transform for images like this; a kernel wider than the image wraps around it."""
        (h, w), (height, width) = self.kernel.shape, like.shape[-2:]
        rows = (torch.arange(h, device=like.device) - h // 2) % height
        columns = (torch.arange(w, device=like.device) - w // 2) % width
        wrapped = torch.zeros(height * width, dtype=like.dtype, device=like.device)
        pixels = (rows[:, None] * width + columns).flatten()
        kernel = once(self, "kernel", like, lambda: self.kernel.to(like))
        return torch.fft.rfft2(wrapped.index_add(0, pixels, kernel.flatten()).reshape(height, width))

    def multiply(self, x: Tensor, transfer: Tensor) -> Tensor:
        """``x`` with its Fourier transform multiplied by ``transfer``."""
        return torch.fft.irfft2(torch.fft.rfft2(x) * transfer, s=x.shape[-2:])

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.transfer(x))

    def transpose(self, y: Tensor) -> Tensor:
        return self.multiply(y, self.transfer(y).conj())

    def solve(self, y: Tensor, r2: Tensor, s2: float) -> Tensor:
        power = self.transfer(y).abs() ** 2
        return self.multiply(y, pseudo_inverse(expand(r2, y) * power + s2, expand(r2, y) * power.max()))


@dataclass(frozen=True, eq=False)
class Dense(Operator):
    """Any matrix, for vectors ``[D]``."""

    matrix: Tensor
    """``[M, D]``"""

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        given = tuple(self.matrix.shape)
        require("matrix", f"shape {given}", f"(M, {shape[-1]}) for vectors of shape {tuple(shape)}",
                len(given) == 2 and given[1:] == tuple(shape))  # fmt: skip
        return given[:1]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix_like(x).T

    def transpose(self, y: Tensor) -> Tensor:
        return y @ self.matrix_like(y)

    def matrix_like(self, x: Tensor) -> Tensor:
        """The matrix with dtype and device of ``x``."""
        return once(self, "matrix", x, lambda: self.matrix.to(x))

    def solve(self, y: Tensor, r2: Tensor, s2: float) -> Tensor:
        matrix = self.matrix_like(y)
        powers, basis = once(self, "spectrum", y, lambda: torch.linalg.eigh(matrix @ matrix.T))
        return (y @ basis * pseudo_inverse(r2[:, None] * powers + s2, r2[:, None] * powers.max())) @ basis.T


def pseudo_inverse(powers: Tensor, largest: Tensor) -> Tensor:
    """``1 / powers``, but 0 for those below the rounding error of the ``largest``."""
    nonzero = powers > 8 * torch.finfo(powers.dtype).eps * largest
    return torch.where(nonzero, 1 / powers, torch.zeros_like(powers))


# --------------------------------------------------------------------------------------------- measurements
@dataclass(frozen=True, eq=False)
class Measurement:
    """``y = operator(x0) + sigma_y n``, ``[B, *M]``: one row for each sample that is drawn."""

    operator: Operator
    y: Tensor
    sigma_y: float = 0.0

    def __post_init__(self) -> None:
        require("sigma_y", self.sigma_y, "0 or more", 0 <= self.sigma_y < math.inf)
        require("y", "numbers that are not finite", "finite ones", bool(torch.isfinite(self.y).all()))

    def residual(self, x0: Tensor) -> Tensor:
        """``y - A x0``, ``[B, *M]``. ``ValueError`` if the measurement does not fit the samples."""
        needed = (len(x0), *self.operator.output_shape(tuple(x0.shape[1:])))
        given = tuple(self.y.shape)
        require("y", f"shape {given}", f"{needed} for {needed[0]} samples of shape {tuple(x0.shape[1:])}",
                given == needed)  # fmt: skip
        return once(self, "y", x0, lambda: self.y.to(x0)) - self.operator.forward(x0)


def measure(operator: Operator, x0: Tensor, sigma_y: float = 0.0, noise: Noise | None = None) -> Measurement:
    """A measurement of ``x0`` ``[B, *S]`` by ``operator``, with noise of standard deviation ``sigma_y``."""
    shape = operator.output_shape(tuple(x0.shape[1:]))
    y = operator.forward(x0)
    if sigma_y > 0:
        y = y + sigma_y * (noise(shape).to(y) if noise else torch.randn_like(y))
    return Measurement(operator, y, sigma_y)


# -------------------------------------------------------------------------------------------------- solvers
Covariance = Callable[[Tensor], Tensor]  # v -> C v, with C the covariance of x0 given x_t
Shift = Callable[[Tensor, Tensor, Tensor, Covariance], Tensor]  # (x0_hat, alpha [B], sigma [B], covariance) -> shift


def pigdm(measurement: Measurement, variance: float = 1.0) -> Guidance:
    """Pseudoinverse guidance (Song et al. 2023, eq. 7), which assumes that ``p(x0 | x_t)`` is ``N(x0_hat, r2 I)``.

    ``grad log p(y | x_t) = J^T A^T (r2 A A^T + sigma_y^2 I)^-1 (y - A x0_hat)`` with ``J = d x0_hat / d x_t``. Data of
    this ``variance`` have ``r2 = variance sigma^2 / (variance alpha^2 + sigma^2)``, which is exact for ``N(mean,
    variance I)`` on any path (tests). The paper has variance 1 (section 3.3).
    """
    require("variance", variance, "above 0", 0 < variance < math.inf)

    def shift(x0: Tensor, alpha: Tensor, sigma: Tensor, covariance: Covariance) -> Tensor:
        r2 = variance * sigma**2 / (variance * alpha**2 + sigma**2)
        solution = measurement.operator.solve(measurement.residual(x0), r2, measurement.sigma_y**2)
        return covariance(measurement.operator.transpose(solution))

    return by_shift(shift)


def dps(measurement: Measurement, scale: float = 1.0) -> Guidance:
    """Diffusion posterior sampling (Chung et al. 2023, eq. 16): down the gradient of ``||y - A x0_hat(x_t)||^2``.

    The paper's step (algorithm 1: ``zeta / ||y - A x0_hat||``, tuned for each task) belongs to 1000 ancestral steps,
    and a denoiser does not know how many there will be. Here, at ``scale`` 1, x0 moves to the minimum along the
    gradient of ``||y - A x0||^2 / sigma_y^2 + (x0 - x0_hat)^T C^-1 (x0 - x0_hat)``, where C is the covariance of x0
    given x_t. The gradient is ``C A^T (y - A x0_hat)``, so C is never inverted. The residual never grows.
    """
    require("scale", scale, "0 … 1", 0 <= scale <= 1)

    def shift(x0: Tensor, alpha: Tensor, sigma: Tensor, covariance: Covariance) -> Tensor:
        residual = measurement.residual(x0)
        direction = covariance(measurement.operator.transpose(residual))
        effect = measurement.operator.forward(direction)
        decrease = (residual * effect).flatten(1).sum(1)
        square = (effect**2).flatten(1).sum(1)
        curvature = square + measurement.sigma_y**2 * decrease.clamp(min=0)
        length = torch.where(square > 0, decrease / curvature, torch.zeros_like(decrease))
        return scale * expand(length, direction) * direction

    return by_shift(shift) if scale else lambda denoise: denoise


def by_shift(shift: Shift) -> Guidance:
    """Guidance that moves the expected data by ``shift``.

    ``covariance(v) = sigma^2 / alpha J^T v`` costs one backward pass: J is ``alpha / sigma^2`` times the covariance of
    x0 given x_t (the second-order Tweedie formula). At alpha = 0 it is a limit, evaluated at a slightly smaller time.

    A network's J is not exact, and its error is multiplied by ``sigma^2 / alpha``: for a flow on digits the C of pure
    noise came out at 0.64 (chart time 0.8), 0.66 (0.9), 1.1 (0.95), 2.7 (0.98), 68 (0.999). So use
    ``within(0, 0.9, pigdm(...))`` for networks; at noisier steps x_t says almost nothing about x0 anyway.
    """

    def guide(denoise: Denoiser) -> Denoiser:
        path = denoise.path
        require_diffusion("measurement", path)

        def predict(x: Tensor, t: Tensor, cond: Cond) -> Prediction:
            t_safe = within_path(path, t, LAST)
            alpha, sigma = path.alpha(t_safe), path.sigma(t_safe)
            with torch.enable_grad():
                x_grad = x.detach().requires_grad_()
                prediction = denoise(x_grad, t_safe, cond)
                x0_hat = prediction.x0

            def covariance(v: Tensor) -> Tensor:
                return expand(sigma**2 / alpha, x) * torch.autograd.grad(x0_hat, x_grad, v)[0]

            x0 = x0_hat.detach() + shift(x0_hat.detach(), alpha, sigma, covariance)
            x1 = (x - expand(path.alpha(t), x) * x0) / expand(path.sigma(t), x)
            return replace_endpoints(prediction, x0, x1)

        return Wrapped(denoise, predict)

    return guide


# --------------------------------------------------------------------------------------------------- SDEdit
def sdedit(
    denoise: Denoiser,
    x0: Tensor,
    times: Tensor,
    cond: Cond = NO_COND,
    *,
    strength: float = 0.5,
    sampler: str = "heun",
    noise: Noise | None = None,
    callback: Callback | None = None,
    **options: object,
) -> Tensor:
    """SDEdit (Meng et al. 2022, algorithm 1): noise pictures ``x0`` ``[B, *S]`` to some time, and sample from there.

    ``strength`` is that chart time as a fraction of that of ``times[0]``: 1 draws a new sample, near 0 the picture
    is kept. The sampler uses the nodes of ``times`` below it. ``noise`` draws each sample's own normals.
    """
    require("strength", strength, "above 0, up to 1", 0 < strength <= 1)
    require("sampler", sampler, ", ".join(SAMPLERS), sampler in SAMPLERS)
    require_diffusion("sdedit", denoise.path)
    times = times.double()
    start = times[:1] if strength == 1 else times_at(denoise.path, strength * chart(denoise.path, times[:1])[0])
    draw = noise or (lambda shape: torch.randn(len(x0), *shape, dtype=x0.dtype, device=x0.device))
    t = shared_time(float(start), len(x0), x0.dtype, x0.device)
    x = mix(denoise.path, x0, draw(x0.shape[1:]), t)
    below = torch.cat([start, times[times < start]])
    with torch.no_grad():
        return SAMPLERS[sampler].function(denoise, x, below, cond, noise=draw, callback=callback, **options)
