"""Guidance: operators with true adjoints, exact inversion, samplers that obey a measurement, composition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffrep import extract, load_backbone
from diffrep.backbones import Conditions
from diffrep.eval.guidance import MEASUREMENTS, METHODS, GuidanceEvaluation, evaluate_guidance
from diffrep.guidance import operators
from diffrep.guidance.composition import Prompts, cycle, superpose
from diffrep.guidance.core import Between, guided
from diffrep.guidance.ensembles import afdps, karras_grid
from diffrep.guidance.inversion import METHODS as INVERSIONS
from diffrep.guidance.inversion import invert, leading_grid, optimise_null, regenerate
from diffrep.guidance.operators import Operator
from diffrep.guidance.posterior import dps, flowchef, measured_start, pigdm, red_diff, spaced_grid
from diffrep.images import fit_image, load_image
from diffrep.painting import diffusion_model
from diffrep.sampling.schedules import Flow, SamplingError, TableVP, TimeGrid
from diffrep.synthesis import EmbeddingGrid
from diffrep.synthesis.composition import compose_canvas, place_object
from diffrep.training.sara import SaRA

from .synthetic_painter import Painter

SHAPE = (3, 12, 12)
SUPERPOSITIONS = ("and", "or", "avg", "and_ode")
GENERATOR = torch.Generator().manual_seed(3)
MASK = (torch.rand(12, 12, generator=GENERATOR) > 0.4).float()
LINEAR: dict[str, Operator] = {
    "inpainting": operators.inpainting(MASK),
    "box": operators.box(SHAPE, 5),
    "averaging": operators.averaging(SHAPE, 3),
    "bicubic": operators.bicubic(SHAPE, 2),
    "gaussian": operators.gaussian(SHAPE, 1.2),
    "motion": operators.motion(SHAPE, 5.0, 30.0),
    "colours": operators.colours(SHAPE),
    "points": operators.points(SHAPE, torch.tensor([[0, 0], [11, 3], [4, 11]])),
    "projections": operators.projections(SHAPE, (0.0, 35.0, 90.0)),
}
TABLE = TableVP(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- operators ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR)
def test_adjoint(name: str) -> None:
    operator = LINEAR[name]
    x = random(2, *SHAPE)
    measured = operator(x)
    y = random(*measured.shape, seed=1)
    left, right = (measured * y).sum(), (x * operator.adjoint(y)).sum()
    assert abs(float(left - right)) <= 1e-5 * float(measured.norm() * y.norm())


def _any_operator(name: str, rng: np.random.Generator) -> Operator:
    """Of a random size, with random parameters."""
    factor = int(rng.integers(1, 5))
    height, width = (factor * int(n) for n in rng.integers(2, 9, size=2))
    shape = (int(rng.integers(1, 5)), height, width)
    places = rng.permutation(height * width)[: int(rng.integers(1, height * width))]
    kinds = {
        "inpainting": lambda: operators.inpainting(
            torch.from_numpy(rng.random((height, width)) > 0.5), channels=shape[0]
        ),
        "box": lambda: operators.box(shape, int(rng.integers(1, min(height, width) + 1))),
        "averaging": lambda: operators.averaging(shape, factor),
        "bicubic": lambda: operators.bicubic(shape, factor),
        "gaussian": lambda: operators.gaussian(shape, rng.uniform(0.2, 4)),
        "motion": lambda: operators.motion(shape, rng.uniform(1, 12), rng.uniform(-180, 180)),
        "colours": lambda: operators.colours(shape, rng.normal(size=shape[0]).tolist()),
        "points": lambda: operators.points(shape, torch.from_numpy(np.stack([places % width, places // width], 1))),
        "projections": lambda: operators.projections((shape[0], height, height), rng.uniform(-180, 180, 3).tolist()),
    }
    return kinds[name]()


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjoint_at_any_size(name: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng([*name.encode()])
    for seed in range(8):
        operator = _any_operator(name, rng)
        x = random(2, *operator.shape, seed=seed).to(dtype)
        measured = operator(x)
        y = random(*measured.shape, seed=50 + seed).to(dtype)
        left, right = ((a.double() * b.double()).sum() for a, b in ((measured, y), (x, operator.adjoint(y))))
        assert measured.dtype == dtype
        assert abs(float(left - right)) <= 1e-5 * float(x.norm() * y.norm()), operator.shape
        assert torch.equal(operator.check(measured), measured)


@pytest.mark.parametrize("name", LINEAR)
def test_pseudo_inverse(name: str) -> None:
    operator = LINEAR[name]
    measured = operator(random(2, *SHAPE))
    again = operator(operator.pinv(measured, rounds=400))
    assert float((again - measured).norm() / measured.norm()) < 1e-3
    # of least norm: nothing that the measurement does not see
    image = operator.pinv(measured, rounds=400)
    hidden = random(2, *SHAPE, seed=5)
    hidden = hidden - operator.pinv(operator(hidden), rounds=400)
    assert abs(float((image * hidden).sum())) < 1e-2 * float(image.norm() * hidden.norm()) + 1e-9


@pytest.mark.parametrize("name", LINEAR)
def test_trace(name: str) -> None:
    operator = LINEAR[name]
    basis = torch.eye(math.prod(SHAPE)).view(-1, *SHAPE)
    assert operator.trace() == pytest.approx(float(operator(basis).square().sum()), rel=1e-4)


def test_a_blur_is_the_blur() -> None:
    from scipy.ndimage import gaussian_filter

    image = random(1, 1, 24, 24)
    ours = operators.gaussian((1, 24, 24), 1.5)(image)[0, 0]
    theirs = gaussian_filter(image[0, 0].numpy(), 1.5, mode="reflect", truncate=4)
    assert float((ours - torch.from_numpy(theirs)).abs().max()) < 5e-3


def test_projections_of_a_point() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 2, 6] = 1
    down, across = operators.projections((1, 9, 9), (0, -90))(image)[0, 0]
    assert int(down.argmax()) == 6
    assert int(across.argmax()) == 2
    assert float(down.sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: operators.points(SHAPE, torch.tensor([[12, 0]])), "lies outside of an image of 12 x 12"),
        (lambda: operators.points(SHAPE, torch.tensor([[1, 0], [1, 0]])), "two points lie on one pixel"),
        (lambda: operators.points(SHAPE, torch.tensor([[-0.5, 3.0]])), "the point -0.5, 3 lies outside"),
        (lambda: operators.points(SHAPE, torch.tensor([[math.nan, 3.0]])), "the point nan, 3 lies outside"),
        (lambda: operators.colours(SHAPE, (0.5, 0.5)), "need 3 weights"),
        (lambda: operators.averaging(SHAPE, 5), "needs sides that it divides"),
        (lambda: operators.box(SHAPE, 13), "a side of 1..12 pixels, got 13"),
        (lambda: operators.gaussian(SHAPE, 0), "a sigma above 0"),
        (lambda: operators.motion(SHAPE, 0.5), "at least 1 pixel long"),
        (lambda: operators.projections((1, 8, 9), (0,)), "square slices"),
        (
            lambda: Operator("HDR", SHAPE, torch.tanh, linear=False).adjoint(torch.zeros(1, *SHAPE)),
            "is not linear: it has no adjoint",
        ),
        (lambda: LINEAR["averaging"].check(torch.zeros(1, 3, 5, 4)), r"measures \(B, 3, 4, 4\), got \(1, 3, 5, 4\)"),
        (
            lambda: afdps(LINEAR["averaging"], torch.zeros(1, 3, 4, 4), torch.zeros(2), sigma_y=1, at="clean"),
            "noisy or denoised, got 'clean'",
        ),
        (lambda: LINEAR["box"].check(torch.full((1, *SHAPE), torch.nan)), "432 values that are not finite"),
    ],
)
def test_refused(make: object, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        make()  # type: ignore[operator]


# -- inversion ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact_network() -> object:
    backbone = load_backbone("tiny", device="cpu", dtype=torch.float64)
    context = backbone.embed("").context.double()
    return lambda x, t: backbone.predict_noise(x, int(t), context)


@pytest.mark.slow
def test_exact_inversion_returns_the_image(exact_network: object) -> None:
    backbone = load_backbone("tiny", device="cpu")
    latent = 0.5 * random(1, backbone.vae.config.latent_channels, 8, 8)
    grid = leading_grid(TableVP(backbone.alphas_cumprod.numpy()), 50)
    errors = {}
    for method in INVERSIONS:
        options = {"gamma": 0.96} if method == "bdia" else {}
        pair = invert(exact_network, latent, grid, method, **options)[-1]
        clean, _ = regenerate(exact_network, pair, grid, method, **options)
        errors[method] = float((clean - latent).abs().max())
    print(errors)
    assert max(errors[name] for name in ("bdia", "edict")) < 1e-6
    assert errors["ddim"] > 1e-4  # it is not exact


def test_inversion_is_what_diffusers_does() -> None:
    from diffusers import DDIMInverseScheduler

    scheduler = DDIMInverseScheduler(
        trained_betas=np.linspace(1e-4, 0.02, 1000), set_alpha_to_one=False, clip_sample=False
    )
    scheduler.set_timesteps(10)
    x = latent = random(1, 2, 4, 4)
    network = lambda v, t: torch.sin(3 * v + t / 500)  # noqa: E731
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x, return_dict=False)[0]
    assert torch.allclose(invert(network, latent, leading_grid(TABLE, 10))[-1][0], x, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: leading_grid(TABLE, 0), "leave no step"),
        (lambda: leading_grid(TABLE, 10, strength=0.05), "leave no step"),
        (lambda: invert(lambda x, t: x, random(1, 2), leading_grid(TABLE, 4), "bdia", gamma=0), "gamma must be in"),
        (lambda: invert(lambda x, t: x, random(1, 2), leading_grid(TABLE, 4), "edict", mix=2), "mix must be"),
        (
            lambda: invert(lambda x, t: x * 1e7, random(1, 2), leading_grid(TABLE, 9)),
            "ddim inversion diverges: step 3 of 9",
        ),
        (lambda: invert(lambda x, t: x, random(1, 2), leading_grid(TABLE, 4), label="after"), "got 'after'"),
        (
            lambda: optimise_null(lambda x, t, c: x, [random(1, 2)], leading_grid(TABLE, 125), *[random(1, 2)] * 2),
            "within 100 steps, got 125",
        ),
    ],
)
def test_inversion_refuses(call: object, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        call()  # type: ignore[operator]


# -- posterior samplers ---------------------------------------------------------------------------------------


class Mixture:
    """The exact network of a mixture of smooth images."""

    def __init__(self) -> None:
        ramp = torch.linspace(-1, 1, 12).expand(3, 12, 12)
        self.means = torch.stack([ramp, -ramp, ramp.mT, -ramp.mT])
        self.tau = 0.1

    def data(self, x: Tensor, a: float, b: float) -> Tensor:
        variance = a**2 * self.tau**2 + b**2
        distance = x[:, None] - a * self.means
        shares = (-distance.square().flatten(2).sum(-1) / (2 * variance)).softmax(1)[..., None, None, None]
        return (shares * (self.means + a * self.tau**2 / variance * distance)).sum(1)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        a, b = float(TABLE.alpha(t)), float(TABLE.sigma(t))
        return (x - a * self.data(x, a, b)) / b


@pytest.mark.parametrize("name", ["averaging", "gaussian", "box", "motion"])
@pytest.mark.parametrize("method", ["dps", "pigdm", "red_diff", "flowchef"])
def test_samplers_obey_the_measurement(name: str, method: str) -> None:
    operator, prior = LINEAR[name], Mixture()
    image = (prior.means[:1] + 0.1 * random(1, *SHAPE, seed=2)).float()
    y, grid = operator(image), spaced_grid(TABLE, 50)
    draws = [random(1, *SHAPE, seed=10 + i).float() for i in range(2 * grid.steps + 1)]
    if method == "red_diff":
        guide = red_diff(operator, y, lambda i: (draws[2 * i], draws[2 * i + 1]), lr=0.05)
        result = guided(prior, measured_start(operator, y, grid, draws[1]), grid, guide)
    elif method == "flowchef":
        flow = TimeGrid.of(Flow(), [1 - 1e-5, *np.arange(49, -1, -1) / 50])
        result = guided(
            lambda x, t: (x - prior.data(x, 1 - t, t)) / t, draws[0], flow,
            flowchef(operator, y, scale=0.1 * y.numel()), prediction="flow_prediction",
        )  # fmt: skip
    else:
        guide = dps(operator, y, weight=0.3) if method == "dps" else pigdm(operator, y)
        result = guided(prior, measured_start(operator, y, grid, draws[0]), grid, guide, gradient=True, noise=draws)
    # nearer to the image than any other mean, and to the measurement than the prior's spread
    errors = (result - prior.means).square().mean((1, 2, 3))
    assert int(errors.argmin()) == 0
    assert float((operator(result) - y).square().mean().sqrt()) < 0.15


def test_a_guide_that_does_nothing_is_ddim() -> None:
    prior, grid = Mixture(), leading_grid(TABLE, 10)
    start = random(1, *SHAPE).float()
    ours = guided(prior, start, grid, Between.ahead)
    assert torch.allclose(ours, regenerate(prior, (start, start), grid)[0], atol=1e-5)


def test_noise_that_is_missing() -> None:
    with pytest.raises(SamplingError, match="no noise was passed"):
        guided(Mixture(), random(1, *SHAPE).float(), spaced_grid(TABLE, 5), lambda b: b.ahead(eta=1.0))


def test_a_diverging_step_is_named() -> None:
    with pytest.raises(SamplingError, match="guidance diverges: step 3 of 10 gives values that are not finite"):
        guided(Mixture(), random(1, *SHAPE).float(), spaced_grid(TABLE, 10), lambda b: b.ahead() / (b.step != 2))


# -- particles ------------------------------------------------------------------------------------------------


def _particles(sigma_y: float, resample: bool = True, sigma_max: float = 3.0, steps: int = 60) -> tuple[Tensor, Tensor]:
    """Of a standard normal prior, seen with noise: the posterior is normal with mean y / (1 + sigma_y^2)."""
    operator = operators.inpainting(torch.ones(1, 2, 2), channels=1)
    generator = torch.Generator().manual_seed(7)
    y, start = torch.ones(1, 1, 2, 2), sigma_max * torch.randn(256, 1, 2, 2, generator=generator)
    log_weights = torch.zeros(256)
    guide = afdps(
        operator, y, log_weights, sigma_y=sigma_y,
        resample=(lambda n, p: torch.multinomial(p, len(p), True, generator=generator)) if resample else None,
    )  # fmt: skip
    grid = karras_grid(steps, 0.02, sigma_max)
    particles = guided(
        lambda x, t: x / (1 + t**2), start, grid, guide, prediction="sample",
        noise=lambda i: torch.randn(256, 1, 2, 2, generator=generator),
    )  # fmt: skip
    return particles, log_weights


def test_particles_are_of_the_posterior() -> None:
    particles, log_weights = _particles(1.0)
    shares = log_weights.softmax(0).view(-1, 1, 1, 1)
    mean = (shares * particles).sum(0)
    variance = (shares * (particles - mean).square()).sum(0).mean()
    assert float((mean - 0.5).abs().max()) < 0.2
    assert float(variance) == pytest.approx(0.5, abs=0.15)


def test_particles_that_explode_say_why() -> None:
    with pytest.raises(SamplingError, match=r"AFDPS diverges: step \d+ of 40 .*must be below 2"):
        _particles(0.05, sigma_max=8.0, steps=40)


# -- composition ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SUPERPOSITIONS)
def test_superposition(method: str) -> None:
    """Two normal densities, left and right: AND ends between them with equal densities, OR at one of them."""
    sigmas = [*np.geomspace(10, 0.02, 200), 0.0]

    def around(mean: float, spread: float = 0.5) -> object:
        def network(x: Tensor, sigma: float) -> Tensor:  # shown x / sqrt(sigma^2 + 1)
            return sigma * (x * math.sqrt(sigma**2 + 1) - mean) / (spread**2 + sigma**2)

        return network

    start = 10 * random(64, 1, 2, 2)
    draws = [random(64, 1, 2, 2, seed=i) for i in range(200)]
    draws = [d.sign() for d in draws] if method == "and_ode" else draws
    x, record = superpose(
        around(-1.0), around(1.0), around(0.0, 2.0), start, sigmas, sigmas[:-1], draws, method=method, guidance=1.0
    )
    centre = x.mean((1, 2, 3))
    gap = (record[1][-1][0] - record[1][-1][1]).abs()
    if method.startswith("and"):
        assert float(gap.max()) < 1e-3
        assert float(centre.abs().mean()) < 0.5
    if method == "or":
        assert float((centre.abs() - 1).abs().mean()) < 0.5
        assert float(gap.median()) > 1


@pytest.mark.parametrize(
    ("method", "options"), [("or", {"lift": 1.0}), ("avg", {"bias": 1.0}), ("and", {"temperature": 2.0})]
)
def test_an_option_of_another_composition_is_refused(method: str, options: dict[str, float]) -> None:
    with pytest.raises(SamplingError, match="lift is of"):
        superpose(
            *[lambda x, t: x] * 3, random(1, 1, 2, 2), [1.0, 0.0], [1.0], [random(1, 1, 2, 2)], method=method, **options
        )


# -- SaRA -----------------------------------------------------------------------------------------------------


def _train(steps: int = 30, **options: object) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(80, 80)
    before = layer.weight.detach().clone()
    optimiser = SaRA(layer.parameters(), 0.05, lr=1e-2, weight_decay=0.0, **options)
    for i in range(steps):
        optimiser.zero_grad()
        (layer(random(16, 80, seed=i).float()) - random(16, 80, seed=100 + i).float()).square().mean().backward()
        optimiser.step()
    return before, layer.weight.detach()


def test_sara_trains_small_weights_alone() -> None:
    before, after = _train()
    small = before.abs() < 0.05
    assert torch.equal(before[~small], after[~small])
    assert float((before != after)[small].float().mean()) > 0.9


def test_the_nuclear_norm_works_and_the_released_one_does_not() -> None:
    def norm(**options: object) -> float:
        before, after = _train(**options)
        return float(torch.linalg.matrix_norm(after - before, "nuc"))

    assert norm(lambda_rank=0.1) < 0.9 * norm(lambda_rank=0.0)
    assert norm(lambda_rank=0.1, official=True) == norm(lambda_rank=0.0, official=True)


def test_sara_refuses() -> None:
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="above 0"):
        SaRA(layer.parameters(), 0)
    with pytest.raises(ValueError, match="no weight is below"):
        SaRA(layer.parameters(), 1e-12)


# -- inverted noise in extraction -----------------------------------------------------------------------------


def test_features_of_inverted_noise() -> None:
    backbone = load_backbone("tiny", device="cpu")
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(4))
    inverted, other = (
        extract(backbone, image, taps="up.1", timestep=t, noise="inverted", inversion_steps=4, seed=s, ensemble=1)
        for t, s in ((100, 0), (100, 7))
    )
    assert torch.equal(inverted["up.1"], other["up.1"])  # no seed in it
    # by hand, from the clean latent up
    pixels = fit_image(load_image(image), backbone.recommended.sizing)[0] / 255
    clean = backbone.noisy(backbone.encode(pixels[None])[0], None, None, 0)
    grid = TimeGrid.of(TableVP(backbone.alphas_cumprod.numpy()), [100, 75, 50, 25, -1]).ending()
    context = backbone.embed("").context
    below = {100: 75, 75: 50, 50: 25, 25: -1}

    def network(x: Tensor, t: float) -> Tensor:  # told the target, its answer converted where the state lies
        return backbone.as_noise(x, backbone.context_maps(x, ["out"], int(t), context)["out"], below[int(t)])

    state = invert(network, clean, grid)[-1][0]
    maps = backbone.network_maps(state, ["up.1"], Conditions(timestep=100))
    assert torch.allclose(maps["up.1"], inverted["up.1"], atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timestep": 0}, "at least 1"),
        ({"clean": True}, "clean True"),
        ({"ensemble": 2}, "an ensemble of 2 needs noise"),
        ({"inversion_steps": 0}, "inversion_steps must be"),
    ],
)
def test_inverted_noise_is_refused(settings: dict[str, object], message: str) -> None:
    settings = {"timestep": 50, "ensemble": 1, **settings}
    with pytest.raises(ValueError, match=message):
        extract("tiny", torch.rand(3, 64, 64), taps="up.1", noise="inverted", **settings)


def test_canvases_under_two_grids() -> None:
    model, size = Painter(), (8, 14)
    first, second = (EmbeddingGrid(torch.eye(6)[rows][None]) for rows in ([0, 1], [2, 3]))
    painted = {m: compose_canvas(model, first, second, size, method=m, steps=12)[0] for m in SUPERPOSITIONS}
    assert all(x.shape == (1, 3, 8, 14) for x in painted.values())
    assert not torch.allclose(painted["avg"], painted["or"])
    gaps = {}
    for method in ("and", "avg"):
        _, (kappas, densities) = compose_canvas(model, first, second, size, method=method, steps=12)
        assert kappas[-1].shape == (1, 1, 8, 14)  # a weight for every place
        gaps[method] = float((densities[-1][0] - densities[-1][1]).abs().mean())
    print(gaps)
    assert gaps["and"] < 0.5 * gaps["avg"]
    alike = [compose_canvas(model, first, first, size, method=m, steps=12)[0] for m in ("avg", "and", "or")]
    assert torch.allclose(alike[0], alike[1], atol=1e-4)
    assert torch.allclose(alike[0], alike[2], atol=1e-4)
    # the noise is that of each line: a canvas of one window is not changed by how many windows pass together
    others = compose_canvas(model, first, second, size, steps=12, batch_size=1)[0]
    assert torch.allclose(others, painted["avg"], atol=1e-5)


def test_an_object_stays_as_it_is_in_a_scene() -> None:
    class Coded(Painter):
        def encode(self, images: Tensor) -> Tensor:
            return torch.nn.functional.avg_pool2d(images * 2 - 1, self.factor)

    model, picture = Coded(), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    scene, mask = EmbeddingGrid(torch.eye(6)[:4].view(2, 2, 6)), torch.ones(32, 32)
    painted = place_object(model, scene, picture, mask, torch.eye(6)[5], (4, 4), (16, 16), steps=20, cycles=2)
    other = place_object(model, scene, 1 - picture, mask, torch.eye(6)[5], (4, 4), (16, 16), steps=20, cycles=2)
    truth = model.encode(picture)
    inside = painted[..., 4:12, 4:12]
    assert float((inside - truth).square().mean()) < 0.5 * float((other[..., 4:12, 4:12] - truth).square().mean())
    with pytest.raises(SamplingError, match="leaves the canvas"):
        place_object(model, scene, picture, mask, torch.eye(6)[5], (12, 4), (16, 16))


@pytest.mark.slow
def test_samplers_through_a_decoder(tmp_path: Path) -> None:
    model = diffusion_model("tiny", [""] * 4, guidance=1.0, device="cpu")
    settings = GuidanceEvaluation(count=1, steps=3, size=64, workers=0)
    report = evaluate_guidance(model, settings, tmp_path)
    assert all(title.endswith(": 1 scene, 3 steps") for title in report.scores)
    assert [title.split(", ")[1].split(":")[0] for title in report.scores] == [*MEASUREMENTS]
    for rows in report.scores.values():
        assert set(rows) == set(METHODS)
        calls = {"pseudo-inverse": 0, "STSL": 6, "AFDPS, 4 particles": 12, "DiffusionMBIR, 3 slices": 18}
        assert {m: row["calls"] for m, row in rows.items()} == {m: [calls.get(m, 3)] for m in METHODS}
        assert all(math.isfinite(value) for row in rows.values() for values in row.values() for value in values)
    assert len(list(tmp_path.glob("*.png"))) == 4
    assert "super-resolution by 4" in report.table()


@pytest.mark.parametrize(
    ("change", "message"), [({"corner": (6, 0)}, "leaves the canvas"), ({"low": 0.8}, "levels must rise")]
)
def test_cycles_refuse(change: dict[str, object], message: str) -> None:
    prompts = Prompts(*[lambda x, t: torch.zeros_like(x)] * 5)
    settings = {"corner": (2, 2), **change}
    with pytest.raises(SamplingError, match=message):
        cycle(
            prompts, torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 8, 8), torch.ones(1, 2, 4, 4),
            grid=leading_grid(TABLE, 10), noise=lambda: torch.zeros(1, 2, 8, 8), **settings,
        )  # fmt: skip


def test_the_object_is_written_where_levels_meet() -> None:
    """Of five steps the last level is the lower one: the object's state enters before any step down."""
    prompts = Prompts(*[lambda x, t: torch.zeros_like(x)] * 5)
    seed, canvas = random(1, 2, 4, 4), random(1, 2, 8, 8, seed=1)
    result = cycle(
        prompts, seed, canvas, torch.ones(1, 2, 4, 4), (2, 3), leading_grid(TABLE, 5), lambda: torch.zeros_like(canvas),
        cycles=0,
    ).result  # fmt: skip
    expected = canvas.clone()
    expected[..., 2:6, 3:7] = seed
    assert torch.allclose(result, expected, atol=1e-6)


def test_the_network_is_told_where_a_step_leads_or_begins() -> None:
    seen: dict[str, list[float]] = {"target": [], "before": []}
    for label, times in seen.items():
        invert(lambda x, t, s=times: s.append(t) or 0 * x, random(1, 2), leading_grid(TABLE, 4), label=label)
    assert seen == {"target": [0, 250, 500, 750], "before": [-250, 0, 250, 500]}
