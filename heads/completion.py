"""Depth from a head and some known depths: guided completion, and holes of maps filled.

On a Marigold this is Marigold-DC: its diffusion follows the known depths. One-step heads have no loop to follow; their
latent is moved through the decoder instead, which is ours and is measured by `diffrep eval completion`.
Fits of scale and shift alone are `DepthMap.align`. Fewer than two different known depths, and a step that diverges, are
a `SamplingError`.

Source: Marigold-DC, arXiv 2412.13389, prs-eth/Marigold-DC 77fa032.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffrep.alignment import LEAST_DISPARITY, fit_robust
from diffrep.files import one_line
from diffrep.guidance.core import Between, Level, Network, check_finite, guided
from diffrep.heads.dense import DenseHead, PredictConfig
from diffrep.heads.maps import DepthMap
from diffrep.heads.segmentation import ObjectMask
from diffrep.heads.tiling import resize
from diffrep.results import read_array
from diffrep.sampling.schedules import SamplingError, TableVP, TimeGrid
from diffrep.settings import NOT_NEGATIVE, POSITIVE, check

Reader = Callable[[Tensor], Tensor]  # latent (1, c, h, w) -> depth (H, W) in [0, 1], differentiable

FEWEST = 50  # known depths from which on a one-step head's latent is moved
MOST = 1500  # known depths that errors are kriged from; all others are met by `carried`
LIKE_DEPTH, LIKE_COLOUR, UNSURE = 0.3, 0.3, 0.1  # lengths of logarithms and of colours in [0, 1]; share of chance


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """How a head follows known depths."""

    steps: int = 50  # of a Marigold's diffusion
    # of Adam on a one-step head's latent, at most, where 50 depths are known: fewer do not say when to stop. 0: the
    # errors that the robust fit leaves are carried around the known pixels, no more
    rounds: int = 30
    rate: float | None = None  # of Adam, on the latent; .05 on a Marigold, .02 on others where left out
    spread: float = 4.0  # cells of the latent over which a one-step head spreads a correction
    reach: float = 2.0  # share of the known pixels' spacing that the errors which are left are carried; 0: none

    def __post_init__(self) -> None:
        check(self, steps="1..1000", rounds="0..", rate=POSITIVE, spread=NOT_NEGATIVE, reach=NOT_NEGATIVE)


def follows(head: DenseHead) -> bool:
    """Whether a head's diffusion follows known depths, as a Marigold's; the latent of others is moved."""
    return head.family.result == "sample" and head.task == "depth"


def guidance_of(head: DenseHead, how: CompletionConfig, ensemble: int = 1) -> dict[str, Any]:
    """What is done to a head under known depths: its name, the options that count, and what it costs an image."""
    if follows(head):
        cost = f"passes with gradients: {ensemble * how.steps} of U-Net and decoder"
        return {"guidance": "Marigold-DC", "steps": how.steps, "rate": how.rate or 0.05, "cost": cost}
    options = {name: value for name, value in vars(how).items() if name != "steps"} | {"rate": how.rate or 0.02}
    cost = f"passes: {ensemble} of the U-Net, then up to {ensemble * how.rounds} of the decoder with gradients"
    return {"guidance": "latent through the decoder", **options, "cost": cost}


def complete_depth(
    head: DenseHead,
    image: Image.Image,
    known: Tensor,
    config: PredictConfig | None = None,
    how: CompletionConfig | None = None,
) -> DepthMap:
    """Metric depth of an image by guidance from known depths.

    Args:
        head: of depth or disparity.
        known: (H, W) metres at the image's size; 0 or not finite where nothing is known.
        config: how the head looks at the image; an ensemble gives the median of its members and their spread.

    Raises:
        ValueError: known depths of another size, fewer than two different ones, a head that cannot follow them, or
            settings that do not go together.
        SamplingError: the guidance diverges.
    """
    config, how = config or PredictConfig(), how or CompletionConfig()
    head.check(replace(config, steps=1))
    if head.task not in ("depth", "disparity") or config.tile is not None or config.steps > 1:
        raise ValueError(f"guided completion is of whole depth maps in its own steps, not of {head.task} with {config}")
    if tuple(known.shape) != (image.height, image.width):
        raise ValueError(
            f"the known depths must be {(image.height, image.width)} like the image, got {tuple(known.shape)}"
        )
    known = torch.where(torch.isfinite(known) & (known > 0), known, 0.0).float().to(head.device)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    canvas, size = head.canvas(pixels, config)
    latents = head.model.encode(canvas)

    def read(latent: Tensor) -> Tensor:
        shown = head.read(head.model.draw_maps(latent, canvas))[..., : size[0], : size[1]]
        return resize(shown, (image.height, image.width))[0, 0]

    follow = _follow_diffusion if follows(head) else _follow_latent
    members = []
    for member in range(config.ensemble):
        noise = None
        if head.family.first_latent == "noise":
            noise = head.model.draw((int(latents.shape[-2]), int(latents.shape[-1])), config.seed, member).to(
                head.device
            )
        depth = follow(head, read, latents, known, noise, how).cpu()
        if not follows(head) and how.reach:
            depth = krige_errors(depth, known.cpu(), pixels[0].cpu() / 255, reach=how.reach)
        members.append(depth)
    depths = torch.stack(members)
    depth, uncertainty = depths[0], None
    if len(members) > 1:
        depth = depths.quantile(0.5, 0)
        uncertainty = (depths - depth).abs().quantile(0.5, 0)
    settings = head.settings(config, family=head.family.name, fit="guided", known_depths=int((known > 0).sum()))
    settings |= guidance_of(head, how, config.ensemble)
    return DepthMap(depth.clamp(min=0), "depth", metric=True, uncertainty=uncertainty, settings=settings)


def fill_holes(completed: DepthMap, known: Tensor) -> DepthMap:
    """Metric depth that is the known depths where there are any, and the completed map between them, met at the rims.

    Args:
        known: (H, W) metres; 0 or not finite where nothing is known.
    """
    known = torch.where(torch.isfinite(known) & (known > 0), known, 0.0).float()
    logs, wanted = (depth.clamp(min=1e-3).log() for depth in (completed.values, known))
    values = torch.where(known > 0, known, carried(logs, wanted, known > 0, reach=8.0).exp())
    return replace(completed, values=values, settings={**completed.settings, "filled": int((known == 0).sum())})


def carried(values: Tensor, wanted: Tensor, seen: Tensor, *, reach: float) -> Tensor:
    """Values without what they miss where it is seen, and around there: a normalised convolution of errors.

    Args:
        values, wanted, seen: (H, W); what is wanted counts where it is seen.
        reach: sigma in pixels. Where nothing is seen within it, the values stay as they are.
    """
    total, weight = _smoothed(torch.stack([torch.where(seen, wanted - values, 0.0), seen.to(values)]), reach)
    single = 1 / (2 * math.pi * reach**2)  # weight of a known pixel on itself
    return values + total / (weight + 0.1 * single)


def fill_mask(predicted: ObjectMask, known: Tensor) -> ObjectMask:
    """A mask that is the known one where it is known, and the predicted one elsewhere, met at the rims.

    Args:
        known: (H, W) in [0, 1] at the image's size; nan where nothing is known.

    Raises:
        ValueError: the known mask has another size, or values beyond [0, 1].
    """
    seen = ~torch.isnan(known)
    if known.shape != predicted.mask.shape or not bool(((known >= 0) & (known <= 1))[seen].all()):
        size = tuple(predicted.mask.shape)
        raise ValueError(f"a known mask is {size} like the image, in [0, 1] or nan; this one is {tuple(known.shape)}")
    logits, wanted = predicted.mask.clamp(0.02, 0.98).logit(), known.nan_to_num(0.5).clamp(0.02, 0.98).logit()
    filled = carried(logits, wanted, seen, reach=8.0).sigmoid()
    settings = {**predicted.settings, "filled": int((~seen).sum())}
    return replace(predicted, mask=torch.where(seen, known, filled), settings=settings)


def read_known_mask(file: Path) -> Tensor:
    """(H, W) in [0, 1], nan where unknown, of a .npy map or of a grey picture that is transparent where unknown.

    Raises:
        ValueError: the file cannot be read so, or the picture has no transparency.
    """
    try:
        if file.suffix.lower() == ".npy":
            return torch.from_numpy(read_array(file).astype(np.float32))
        with Image.open(file) as opened:
            opaque = "A" not in opened.getbands() and "transparency" not in opened.info
            grey, alpha = (np.asarray(band, np.float32) for band in opened.convert("LA").split())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as a known mask ({one_line(error)})") from None
    if opaque:
        raise ValueError(f"{file}: a known mask is transparent where nothing is known, this picture is opaque")
    return torch.from_numpy(np.where(alpha > 127, grey / 255, np.nan))


def krige_errors(depth: Tensor, known: Tensor, image: Tensor, *, reach: float) -> Tensor:
    """Depth without what it misses at known pixels, at pixels that lie near, at a like depth and with a like colour.

    Gaussian process regression of errors of logarithms, that is, simple kriging of what is left of a fit.

    Args:
        depth, known: (H, W) metres; known is 0 where there is none.
        image: (3, H, W) in [0, 1].
        reach: share of the mean spacing of known pixels.
    """
    height, width = depth.shape
    places, logs = known.flatten().nonzero()[:, 0], depth.clamp(min=1e-3).log()
    length = reach * math.sqrt(depth.numel() / len(places))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    features = torch.stack([x / length, y / length, logs / LIKE_DEPTH, *(image / LIKE_COLOUR)], -1).flatten(0, 1)
    mixed = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:MOST]
    used = places[mixed]

    def likeness(rows: Tensor) -> Tensor:
        return (-torch.cdist(rows, features[used]).square() / 2).exp().double()

    missed = (known.flatten()[used].log() - logs.flatten()[used]).double()
    weights = torch.linalg.solve(likeness(features[used]) + UNSURE * torch.eye(len(used), dtype=torch.double), missed)
    errors = torch.cat([likeness(rows) @ weights for rows in features.split(16384)])
    met = logs + errors.view(height, width).to(logs)
    return (met if len(places) <= MOST else carried(met, known.log(), known > 0, reach=length)).exp()


class Ruler:
    """Scale and shift between a relative and a metric map, with squares as factors so that neither changes its sign.

    Args:
        known: (H, W) metres; 0 where there is none.
        scale, shift: to begin with; the range of the known depths and their minimum where left out.
    """

    def __init__(self, known: Tensor, *, scale: float | None = None, shift: float | None = None) -> None:
        depths = known[known > 0]
        if not len(depths) or not float(depths.max()) > float(depths.min()):
            raise SamplingError(f"guided completion needs two different known depths, got {len(depths)}: fit instead")
        self.known, self.seen = known, known > 0
        self.scale = float(depths.max() - depths.min()) if scale is None else scale
        self.shift = float(depths.min()) if shift is None else shift
        self.parameters = [torch.ones((), device=known.device, requires_grad=True) for _ in range(2)]

    def metric(self, depth: Tensor) -> Tensor:
        """What values in [0, 1] measure."""
        scale, shift = self.parameters
        return scale**2 * self.scale * depth + shift**2 * self.shift

    def loss(self, depth: Tensor) -> Tensor:
        """Mean absolute plus mean squared distance from the known depths."""
        difference = (self.metric(depth) - self.known)[self.seen]
        return difference.abs().mean() + difference.square().mean()


def complete_by_diffusion(
    network: Network,
    read: Reader,
    known: Tensor,
    noise: Tensor,
    grid: TimeGrid,
    *,
    prediction: str = "v_prediction",
    lands: Sequence[Level] | None = None,
    lr: float = 0.05,
    lr_scale: float = 0.005,
) -> Tensor:
    """Marigold-DC: every step of the diffusion is preceded by one of Adam on the latent, scale and shift.

    Gradients run through the decoder and the network; its memory lasts over all steps.

    Args:
        network: of the depth latent alone, the image bound.
        read: the decoder, at the size of `known`.
        known: (H, W) metres; 0 where there is none.
        noise: (1, c, h, w) the first latent.
        grid: times of a sampler with trailing spacing; where its steps lead, `lands`, see `guided`.
        lr, lr_scale: of Adam, on the latent and on scale and shift.

    Returns:
        (H, W) metres.
    """
    ruler = Ruler(known)
    leaf = noise.detach().clone().requires_grad_()
    groups = [{"params": ruler.parameters, "lr": lr_scale}, {"params": [leaf], "lr": lr}]
    adam = torch.optim.Adam(groups)

    def guide(between: Between) -> Tensor:
        with torch.enable_grad():
            forms = between.forms()
            parameters = [between.x, *ruler.parameters]
            gradient, *others = torch.autograd.grad(ruler.loss(read(forms["data"])), parameters)
        # as long as the predicted noise, so that its weight does not depend on how many depths are known
        gradient = gradient * forms["noise"].detach().norm() / gradient.norm().clamp(min=1e-8)
        leaf.data, leaf.grad = between.x.detach().clone(), gradient
        for parameter, slope in zip(ruler.parameters, others, strict=True):
            parameter.grad = slope
        adam.step()
        return between.ahead(leaf.detach()).detach()

    latent = guided(
        network, noise, grid, guide, prediction=prediction, gradient=True, lands=lands, name="guided completion"
    )
    with torch.no_grad():
        return ruler.metric(read(latent))


def _follow_diffusion(
    head: DenseHead, read: Reader, latents: Tensor, known: Tensor, noise: Any, how: CompletionConfig
) -> Tensor:
    schedule = head.model.schedule
    times, total = schedule.timesteps(how.steps), len(schedule.alphas_cumprod)
    table = TableVP(schedule.alphas_cumprod.numpy())

    def network(x: Tensor, t: float) -> Tensor:
        output: Tensor = head.model.network(head.model.unet_input(latents, x), int(t), head.family.task_vector)
        return output.float()

    grid = TimeGrid.of(table, [*times, -1])
    ends = [
        float(schedule.alphas_cumprod[t]) if t >= 0 else schedule.last_alpha
        for t in (t - total // how.steps for t in times)
    ]
    lands = [(alpha**0.5, (1 - alpha) ** 0.5) for alpha in ends]
    return complete_by_diffusion(
        network, read, known, noise, grid, prediction=schedule.predicts, lands=lands, lr=how.rate or 0.05
    )


def _follow_latent(
    head: DenseHead, read: Reader, latents: Tensor, known: Tensor, noise: Any, how: CompletionConfig
) -> Tensor:
    """The latent that the head predicts, moved by Adam so that what is decoded of it meets the known depths.

    Errors are counted in logarithms: far pixels do not outweigh all others. A gradient reaches few cells around each
    known pixel; it is blurred, so that a correction carries its surroundings along. A fifth of the known pixels is left
    out and says after how many rounds the latent is best, which may be none.
    """
    with torch.no_grad():
        start = head.model.predict(latents, noise)
        first = read(start)
    seen, inverse = known > 0, head.task == "disparity"
    target = torch.where(seen, known, 1.0)
    scale, shift = (float(v) for v in fit_robust(first[None], (1 / target if inverse else target)[None], seen[None]))
    ruler = Ruler(known, scale=scale, shift=shift)
    leaf, rate = start.detach().float().clone().requires_grad_(), how.rate or 0.02
    adam = torch.optim.Adam([{"params": [leaf], "lr": rate}, {"params": ruler.parameters, "lr": rate / 10}])
    mixed = torch.randperm(int(seen.sum()), generator=torch.Generator().manual_seed(0)).to(known.device)
    judges, led = mixed[: len(mixed) // 5], mixed[len(mixed) // 5 :]
    best, least, rounds = first, math.inf, how.rounds if len(mixed) >= FEWEST else 0
    for step in range(rounds + 1):
        with torch.enable_grad():
            measured = ruler.metric(read(leaf))
            depth = 1 / measured.clamp(min=LEAST_DISPARITY) if inverse else measured.clamp(min=1e-3)
            error = (depth.log() - target.log())[seen]
            loss = error[led].abs().mean() + error[led].square().mean()
            gradient, *others = torch.autograd.grad(loss, [leaf, *ruler.parameters])
        missed = float((error[judges] if len(judges) else error).detach().abs().mean())
        if missed < least:
            best, least = depth.detach(), missed
        leaf.grad = _smoothed(gradient, how.spread)
        for parameter, slope in zip(ruler.parameters, others, strict=True):
            parameter.grad = slope
        adam.step()
        check_finite("guided completion", leaf.detach(), step, rounds + 1)
    return best


def _smoothed(x: Tensor, sigma: float) -> Tensor:
    """(..., H, W) under a Gaussian of so many cells, borders repeated."""
    from scipy.ndimage import gaussian_filter  # a fifteenth of the start of `diffrep depth`, which seldom needs it

    sigmas = (*(0.0,) * (x.ndim - 2), sigma, sigma)
    return torch.from_numpy(gaussian_filter(x.cpu().numpy(), sigmas, mode="nearest", truncate=3.0)).to(x)
