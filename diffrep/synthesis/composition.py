"""Canvases under two conditions (SuperDiff), and around an object that stays as it is (COW); whole in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.backbones import draw_noise
from diffrep.guidance.composition import Method, Prompts, Superposition, cycle, superpose
from diffrep.guidance.core import Network
from diffrep.guidance.inversion import leading_grid
from diffrep.sampling.core import to_forms
from diffrep.sampling.samplers import model_schedule
from diffrep.sampling.schedules import SamplingError, TableVP
from diffrep.synthesis.canvas import Lines, WindowPlan, window_weights
from diffrep.synthesis.grids import EmbeddingGrid
from diffrep.synthesis.model import SynthesisModel

Under = Callable[[EmbeddingGrid | None], Network]  # a grid, or no condition -> noise of a canvas under it


def canvas_networks(
    model: SynthesisModel, size: tuple[int, int], *, corner: tuple[int, int] = (0, 0), batch_size: int = 16
) -> tuple[Under, TableVP]:
    """What makes networks of whole canvases (1, c, H, W) of a network of windows; predictions are averaged.

    Args:
        size: (H, W) of the canvas in latent pixels; smaller states lie on it at `corner`.

    Raises:
        SamplingError: the model is a flow.
    """
    prediction, schedule = model_schedule(model.scheduler)
    if not isinstance(schedule, TableVP):
        raise SamplingError(f"{model.name}: conditions are composed on tables of noise, not on flows")
    side, profile = model.window, window_weights("hann", model.window)

    @cache
    def layout(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 2) corners, (N, side, side) places in a state that lies flat, and (H W,) how much meets at each."""
        plan = WindowPlan((height, width), side, max(side // 2, 1))
        corners = torch.cartesian_prod(torch.tensor(plan.rows), torch.tensor(plan.columns)).view(-1, 2)
        inside = torch.arange(side)[:, None] * width + torch.arange(side)
        places = (corners[:, 0] * width + corners[:, 1])[:, None, None] + inside
        weights = profile.expand(len(places), -1, -1).flatten()
        return corners, places, torch.zeros(height * width).index_add(0, places.flatten(), weights)

    def under(grid: EmbeddingGrid | None) -> Network:
        def noise(x: Tensor, t: float) -> Tensor:
            height, width = x.shape[-2:]
            corners, places, weight = layout(height, width)
            flat = x[0].flatten(1)
            total = torch.zeros_like(flat)
            for rows in torch.arange(len(places)).split(batch_size):
                context = model.null_context(len(rows))
                if grid is not None:
                    offsets = corners[rows] + torch.tensor((0, 0) if (height, width) == size else corner)
                    context = model.context(grid.at(offsets, side).to(model.device, model.dtype))
                windows = flat[:, places[rows]].movedim(1, 0).to(model.device, model.dtype)
                output = model(windows, torch.tensor(t, device=model.device), context).to(x) * profile
                total = total.index_add(1, places[rows].flatten(), output.movedim(0, 1).flatten(1))
            output = (total / weight).unflatten(1, (height, width))[None]
            return to_forms(prediction, output, x, float(schedule.alpha(t)), float(schedule.sigma(t)))["noise"]

        return noise

    return under, schedule


def canvas_noise(seed: int, channels: int, size: tuple[int, int], step: int = -1) -> Tensor:
    """(1, c, H, W) standard normal noise of a step, -1 to start from: that of `denoise_canvas`, line by line."""
    lines = [draw_noise((channels, size[1]), seed, line, stream=step + 1) for line in range(size[0])]
    return torch.stack(lines, dim=2)


@torch.no_grad()
def compose_canvas(
    model: SynthesisModel,
    first: EmbeddingGrid,
    second: EmbeddingGrid,
    size: tuple[int, int],
    *,
    method: Method = "avg",
    steps: int = 100,
    guidance: float | None = None,
    lift: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
) -> tuple[Tensor, Superposition]:
    """Sample a canvas under two grids at once; densities are compared around every place, within a window.

    The weight then changes from place to place, so that "and" holds densities about equal, and not exactly.

    Args:
        size: (H, W) in latent pixels; each grid has a cell for every window's side, begun or whole.
        method: "avg" takes the mean of both predictions, "and" holds both densities equal, "or" follows the denser.
        steps: Euler steps; the densities are estimates that want many.
        guidance: the model's own where left out.
        lift: see `superpose`.

    Returns:
        (1, c, H, W) latents, scaled, for `paint`, and what the composition leaves beside them.

    Raises:
        SamplingError: the model is a flow, or a step diverges.
    """
    from diffusers import EulerDiscreteScheduler

    under, _ = canvas_networks(model, size, batch_size=batch_size)
    options: dict[str, Any] = {"timestep_spacing": "trailing", "use_karras_sigmas": True}  # small steps at the end
    scheduler: Any = EulerDiscreteScheduler.from_config(dict(model.scheduler), **options)
    scheduler.set_timesteps(steps)
    reach = model.window // 2

    def around(x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x.sum(1, keepdim=True), 2 * reach + 1, 1, reach, count_include_pad=False)
        return pooled * (2 * reach + 1) ** 2

    def draw(step: int) -> Tensor:
        z = canvas_noise(seed, model.channels, size, step)
        return z.sign() if method == "and_ode" else z

    start = canvas_noise(seed, model.channels, size) * float(scheduler.init_noise_sigma)
    return superpose(
        under(first), under(second), under(None), start, scheduler.sigmas.tolist(), scheduler.timesteps.tolist(), draw,
        method=method, lift=lift, guidance=model.about.guidance if guidance is None else guidance, sums=around,
    )  # fmt: skip


@torch.no_grad()
def place_object(
    model: SynthesisModel,
    scene: EmbeddingGrid,
    picture: Tensor,
    mask: Tensor,
    embedding: Tensor,
    corner: tuple[int, int],
    size: tuple[int, int],
    *,
    steps: int = 20,
    cycles: int = 5,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> Tensor:
    """COW: paint a scene around an object that stays as it is.

    Of COW's five prompts the scene's embeddings are the prompt and the object's are what is suppressed elsewhere; the
    others, of good and bad quality, are no condition here.

    Args:
        picture: (1, 3, h, w) of the object in [0, 1]; sides are multiples of the autoencoder's stride, of at least a
            window.
        mask: (h, w) in 0..1.
        embedding: (dim,) of the object.
        corner: row and column of the object, latent pixels.
        size: (H, W) of the canvas, latent pixels.

    Returns:
        (1, c, H, W) latents, scaled, for `paint`.

    Raises:
        SamplingError: the model is a flow, the object leaves the canvas, or a step diverges.
    """
    under, schedule = canvas_networks(model, size, corner=corner, batch_size=batch_size)
    grey = torch.full((1, 3, size[0] * model.factor, size[1] * model.factor), 0.5)
    top, left = (place * model.factor for place in corner)
    height, width = picture.shape[-2:]
    room = grey[..., top : top + height, left : left + width]
    if min(corner) < 0 or room.shape != picture.shape:
        raise SamplingError(f"an object of {height} x {width} pixels at row {top}, column {left} leaves the canvas")
    room.copy_(torch.where(mask > 0.5, picture, room))
    kind, none = EmbeddingGrid(embedding.view(1, 1, -1)), under(None)
    draws = count()
    return cycle(
        Prompts(empty=none, prompt=under(scene), negative=none, suppress=under(kind), diverse=none),
        model.encode(picture).float().cpu(), model.encode(grey).float().cpu(),
        (F.avg_pool2d(mask[None, None].float(), model.factor) > 0.5).float(), corner, leading_grid(schedule, steps),
        lambda: canvas_noise(seed, model.channels, size, next(draws)), cycles=cycles,
        guidance=model.about.guidance if guidance is None else guidance,
    ).result  # fmt: skip


def as_lines(latents: Tensor) -> Lines:
    """(1, c, H, W) latents as a canvas in memory."""
    lines = Lines((latents.shape[2], latents.shape[1], latents.shape[3]), "float32")
    lines.write(0, latents[0].movedim(1, 0).contiguous().float().cpu().numpy())
    return lines
