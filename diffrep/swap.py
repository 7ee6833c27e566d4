"""Instance swapping: one object keeps its pose and takes another's looks (sd-dino, "A Tale of Two Features").

Every place of the object that keeps its pose is matched with its nearest place in the object that lends its looks (a
dense field), the lending image is read there (a warp), and the result is blended into the first image (a composite):
`swap_appearance`. Where no masks are known, `cosegment` finds the object that two images have in common; `refine` lets
a diffusion model go over the result until it looks like one of its images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from diffrep.backbones import BackboneError, LatentDiffusion, draw_noise
from diffrep.features import Descriptors, check_descriptors, lattice, sample
from diffrep.guidance.core import levels
from diffrep.guidance.inversion import METHODS, invert, optimise_null, redraw
from diffrep.images import ImageLike, Sizing, fit_image, load_image, stack_pixels
from diffrep.masks import read_mask
from diffrep.matching import open_cells
from diffrep.sampling.schedules import TableVP, TimeGrid
from diffrep.settings import Metric, RefineConfig, SwapConfig
from diffrep.similarity import nearest, similarities

SIDE = 256  # pixels: the longer side at which co-segmentation's masks are refined
BORDER_NEIGHBOURS = 5  # places of the border whose likeness is averaged
MARGIN = 0.3  # standard deviations above the threshold that separates the scores best


@dataclass(frozen=True)
class SwapField:
    """For each of h x w places that tile the image that keeps its pose: where its look comes from.

    Attributes:
        points: (h, w, 2), (x, y) in pixels of the lending image; NaN where `valid` is not.
        valid: (h, w) bool: the places that are painted.
        image_size: (H, W) of the image that keeps its pose.
        step: pixels of the lending image between the places that points are chosen from.
    """

    points: Tensor
    valid: Tensor
    image_size: tuple[int, int]
    step: float


def swap_appearance(
    image: ImageLike,
    other: ImageLike,
    pose: Descriptors,
    appearance: Descriptors,
    config: SwapConfig | None = None,
    *,
    pose_mask: Tensor | None = None,
    mask: Tensor | None = None,
) -> Image.Image:
    """Give the object in one image the looks of the object in the other.

    Args:
        image: as `load_image` takes it; keeps its pose and everything outside of its mask.
        other: likewise; lends its looks.
        pose, appearance: descriptors of the two, fused together.
        pose_mask: (H', W') over the whole of `image`, at any resolution: what is painted; everything where None.
        mask: the same for `other`: where looks may come from.

    Returns:
        RGB of the size of `image`.

    Raises:
        ValueError: a mask leaves nothing, or an image is not the one that was described.
    """
    check_descriptors(pose=pose, appearance=appearance)
    config = config or SwapConfig()
    image, other = load_image(image), load_image(other)
    for picture, descriptors in ((image, pose), (other, appearance)):
        height, width = descriptors.placement.image_size
        if picture.size != (width, height):
            raise ValueError(
                f"the image is {picture.height} x {picture.width}, its descriptors are of one of {height} x {width}"
            )
    field = swap_field(pose, appearance, config, pose_mask=pose_mask, mask=mask)
    return composite(image, warp(other, smooth_field(field, config.smooth)), pose_mask, feather=config.feather)


@torch.no_grad()
def swap_field(
    pose: Descriptors,
    appearance: Descriptors,
    config: SwapConfig | None = None,
    *,
    pose_mask: Tensor | None = None,
    mask: Tensor | None = None,
) -> SwapField:
    """Match places of one image with their nearest places in the other; masks as in `swap_appearance`.

    Raises:
        ValueError: a mask leaves nothing.
    """
    config = config or SwapConfig()
    size, other_size = (_reduced(d.placement.image_size, config.resolution) for d in (pose, appearance))
    painted, sources, places = _nearest_places((pose, size, pose_mask), (appearance, other_size, mask), config.metric)
    if not bool(painted.any()):
        raise ValueError("there is no place to paint: the mask of the image that keeps its pose is empty")
    points = places.new_full((len(painted), 2), torch.nan)
    points[painted] = places[sources]
    step = max(appearance.placement.image_size) / max(other_size)
    return SwapField(points.unflatten(0, size), painted.unflatten(0, size), pose.placement.image_size, step)


@torch.no_grad()
def swap_colours(
    pose: Descriptors,
    appearance: Descriptors,
    colours: Tensor,
    size: tuple[int, int],
    *,
    pose_mask: Tensor | None = None,
    mask: Tensor | None = None,
    metric: Metric = "euclidean",
) -> Tensor:
    """Paint every place of one image with the colour of its nearest place in the other, as sd-dino's script does.

    The work grows with the product of the pixels of `size` and of `colours`: these are sizes such as 128 to 512 on a
    side, not those of photographs.

    Args:
        pose, appearance: descriptors of the image that is painted and of the one that lends its colours.
        colours: (3, h, w), the appearance image at any resolution.
        size: (h, w) of the result, over the whole pose image.
        pose_mask, mask: as in `swap_appearance`.

    Returns:
        (3, *size), black outside `pose_mask`.

    Raises:
        ValueError: `colours` is no (3, h, w) image, or `mask` leaves nothing.
    """
    if colours.ndim != 3 or colours.shape[0] != 3:
        raise ValueError(f"colours must be (3, h, w), got {tuple(colours.shape)}")
    other_size = (colours.shape[1], colours.shape[2])
    painted, sources, _ = _nearest_places((pose, size, pose_mask), (appearance, other_size, mask), metric)
    result = colours.new_zeros(3, size[0] * size[1])
    result[:, painted.to(colours.device)] = colours.flatten(1)[:, sources.to(colours.device)]
    return result.unflatten(1, size)


Side = tuple[Descriptors, tuple[int, int], Tensor | None]  # of a swap: descriptors, size (h, w) of its places, mask


def _nearest_places(pose: Side, appearance: Side, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """Which of h * w places are painted (bool), from which of the other's places, and where all of those lie."""
    (places, painted), (other_places, lending) = _places(*pose), _places(*appearance)
    best = nearest(pose[0].at(places[painted]), appearance[0].at(other_places[lending]), metric)
    return painted, lending.nonzero()[:, 0][best.indices], other_places


def _places(descriptors: Descriptors, size: tuple[int, int], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h * w, 2) image points of the pixels of a resized image, and the (h * w,) bool that the mask selects."""
    image_size = descriptors.placement.image_size
    scale = torch.tensor([image_size[1] / size[1], image_size[0] / size[0]], device=descriptors.device)
    points = ((lattice(size, descriptors.device) + 0.5) * scale - 0.5).flatten(0, 1)
    if mask is None:
        return points, torch.ones(len(points), dtype=torch.bool, device=descriptors.device)
    return points, read_mask(mask, points, image_size)


def _reduced(size: tuple[int, int], long: int) -> tuple[int, int]:
    """The size (h, w) with `long` along the longer side, never more than there are pixels."""
    scale = min(1.0, long / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def smooth_field(field: SwapField, side: int) -> SwapField:
    """Replace points that are far from their neighbours' by the median, of x and of y, of a window of valid places.

    Far is more than half a window: a field that follows the object moves about one step per place.
    """
    if side == 1:
        return field
    margin = side // 2
    padded = F.pad(field.points.movedim(-1, 0)[None], (margin,) * 4, value=torch.nan)
    windows = F.unfold(padded, side).view(2, side * side, *field.valid.shape)
    median = windows.nanmedian(1).values.movedim(0, -1)
    outlying = (field.points - median).abs().amax(-1, keepdim=True) > (margin + 1) * field.step
    return replace(field, points=torch.where(outlying, median, field.points))


def warp(other: Image.Image, field: SwapField) -> Image.Image:
    """Read the lending image where the field says, at every pixel of the image that keeps its pose.

    Between the field's places the points are interpolated, but not across a jump of the field: there the nearest
    place alone counts. Pixels outside of the valid places are read as their nearest valid place.

    Returns:
        RGB of the size of the image that keeps its pose.
    """
    (h, w), (height, width) = field.valid.shape, field.image_size
    rows, columns = ndimage.distance_transform_edt(
        ~field.valid.cpu().numpy(), return_distances=False, return_indices=True
    )
    points = field.points.cpu()[torch.from_numpy(rows).long(), torch.from_numpy(columns).long()]
    cells = (lattice((height, width)) + 0.5) * torch.tensor([w / width, h / height]) - 0.5

    def at(places: Tensor) -> Tensor:
        return points[places[..., 1].long().clamp(0, h - 1), places[..., 0].long().clamp(0, w - 1)]

    nearest_place = at(cells.round())
    total, weights = torch.zeros(height, width, 2), torch.zeros(height, width, 1)
    for corner in lattice((2, 2)).flatten(0, 1):
        near = at(cells.floor() + corner)
        together = (near - nearest_place).abs().amax(-1, keepdim=True) <= 4 * field.step
        weight = (1 - (cells - cells.floor() - corner).abs()).prod(-1, keepdim=True) * together
        total += weight * near
        weights += weight
    places = torch.where(weights > 0, total / weights.clamp(min=1e-12), nearest_place)
    pixels = torch.from_numpy(np.array(other.convert("RGB")))
    return Image.fromarray(sample(pixels, places).round().clamp(0, 255).byte().numpy())


def composite(image: Image.Image, painted: Image.Image, mask: Tensor | None, *, feather: float = 1.5) -> Image.Image:
    """Blend a painted image into one of the same size where a mask (H', W') over the whole image says so.

    Args:
        feather: sigma of the Gaussian that softens the mask's edge, pixels.
    """
    if mask is None:
        return painted
    shape = Image.fromarray((mask > 0).cpu().numpy().astype(np.uint8) * 255)
    soft = ndimage.gaussian_filter(np.asarray(shape.resize(image.size, Image.Resampling.BILINEAR), np.float32), feather)
    return Image.composite(painted, image, Image.fromarray(soft.round().astype(np.uint8)))


@torch.no_grad()
def cosegment(images: Sequence[Image.Image], descriptors: Sequence[Descriptors]) -> tuple[Tensor, Tensor]:
    """Masks of the object that two images share, from their descriptors alone: no labels, no training.

    A place belongs to the object where the other image shows something like it and the border of its image does not:
    the object must not fill the border. The edges of the masks follow those of the images. Where masks are known, give
    those instead.

    Args:
        images: two RGB images.
        descriptors: of the two, fused together.

    Returns:
        (H, W) bool for each, over the whole image, with its longer side at most `SIDE` pixels.

    Raises:
        ValueError: these are not two images, or nothing in them can be told from their borders.
    """
    if len(images) != 2 or len(descriptors) != 2:
        raise ValueError(f"an object in common takes two images, got {len(images)} and {len(descriptors)} descriptors")
    scores = [_object_scores(here, other) for here, other in zip(descriptors, reversed(descriptors), strict=True)]
    on_image = torch.cat([s[s.isfinite()] for s in scores])
    threshold = otsu_threshold(on_image) + MARGIN * on_image.std()
    masks = []
    for number, (image, described, score) in enumerate(zip(images, descriptors, scores, strict=True), 1):
        score = torch.where(score.isfinite(), score - threshold, on_image.min() - threshold)
        masks.append(_at_edges(image, described, score) > 0)
        if not bool(masks[-1].any()):
            raise ValueError(f"no object was found in image {number} of 2: give its mask")
    return masks[0], masks[1]


def _object_scores(here: Descriptors, other: Descriptors) -> Tensor:
    """(h, w): likeness to the best place of the other image minus that to this image's border; -inf on padding."""
    rows, inside = here.rows(), here.on_image()
    # the outermost ring of places on the image: those with a neighbour that is not
    ring = inside & (F.max_pool2d(F.pad((~inside)[None, None].float(), (1,) * 4, value=1.0), 3, stride=1)[0, 0] > 0)
    border = ring.flatten().nonzero()[:, 0]
    likeness = similarities(rows, rows[border])
    likeness[border, torch.arange(len(border), device=border.device)] = -1  # a border place is not its own neighbour
    background = likeness.topk(min(BORDER_NEIGHBOURS, len(border)), dim=1).values.mean(1)
    common = similarities(rows, other.rows()[open_cells(other, None)]).amax(1)
    return (common - background).unflatten(0, here.size).masked_fill(~inside, -torch.inf).cpu()


def otsu_threshold(values: Tensor) -> Tensor:
    """The value () that splits values (N,) into two classes with the greatest variance between them (Otsu 1979)."""
    ordered = values.flatten().sort().values.double()
    below = torch.arange(1, len(ordered), dtype=torch.float64)
    above = len(ordered) - below
    sums = ordered.cumsum(0)
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above).square()
    return ordered[between.argmax()].float()


def _at_edges(image: Image.Image, described: Descriptors, score: Tensor) -> Tensor:
    """Scores of places -> (H, W) scores of the reduced image's pixels, with edges where the image has them."""
    size = _reduced((image.height, image.width), SIDE)
    field = Descriptors((score[..., None],), (1.0,), described.placement, described.grid)
    upsampled = field.at(_places(field, size, None)[0]).parts[0].view(1, 1, *size)
    resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)
    guide = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255
    return guided_filter(upsampled, guide, radius=max(1, round(0.08 * max(size))))[0, 0]


def guided_filter(maps: Tensor, guide: Tensor, *, radius: int, regularity: float = 1e-3) -> Tensor:
    """Smooth a map by local linear functions of a colour image (He, Sun and Tang 2010, equations 19 to 21).

    Args:
        maps: (1, 1, H, W).
        guide: (1, 3, H, W) in [0, 1].
        radius: of the square windows, pixels.
        regularity: the epsilon of the paper, for colours in [0, 1].

    Returns:
        (1, 1, H, W).
    """

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(values, (radius,) * 4, mode="replicate"), 2 * radius + 1, stride=1)

    colour, value = mean(guide), mean(maps)
    products = (guide[:, :, None] * guide[:, None]).flatten(1, 2)
    spread = mean(products).unflatten(1, (3, 3)) - colour[:, :, None] * colour[:, None]
    joint = (mean(guide * maps) - colour * value).permute(0, 2, 3, 1)[..., None]
    spread = spread.permute(0, 3, 4, 1, 2) + regularity * torch.eye(3)
    slope = torch.linalg.solve(spread, joint)[..., 0].permute(0, 3, 1, 2)
    offset = value - (slope * colour).sum(1, keepdim=True)
    return (mean(slope) * guide).sum(1, keepdim=True) + mean(offset)


@torch.no_grad()
def refine(
    image: ImageLike,
    backbone: LatentDiffusion,
    config: RefineConfig | None = None,
    *,
    mask: Tensor | None = None,
    feather: float = 1.5,
) -> Image.Image:
    """Let a diffusion model draw an image, or what a mask selects of it, again from partial noise.

    The image gets noise up to some timestep and is denoised again (SDEdit, arXiv:2108.01073); outside of the mask every
    step is overwritten with the noised original, so that only the object changes (Blended Diffusion,
    arXiv:2111.14818). The model sees the square around the mask, with a margin, at its own resolution. sd-dino
    describes its refinement as DDIM inversion and sampling with injected features, but never released it; an inversion
    in place of drawn noise is `RefineConfig.inversion`, and what the mask does not select then goes back as it came.

    Args:
        image: as `load_image` takes it.
        backbone: its U-Net and VAE encoder are used; the VAE decoder is read from its folder.
        mask: (H', W') over the whole image, at any resolution: what may change; everything where None.
        feather: softness of the mask's edge, pixels of the image.

    Returns:
        RGB of the same size.

    Raises:
        ValueError: the mask is empty.
        BackboneError: the backbone's folder has no VAE with a decoder.
    """
    config, image = config or RefineConfig(), load_image(image)
    if not isinstance(backbone, LatentDiffusion):
        raise TypeError(f"refine needs a latent diffusion model with a U-Net, got {type(backbone).__name__}")
    box = (0, 0, *image.size) if mask is None else _square_around(mask, image.size)
    crop = image.crop(box)
    side = backbone.recommended.sizing.size
    canvas = Sizing("pad", side if isinstance(side, int) else max(side or (512,)), resample="lanczos", fill="edge")
    pixels, placement = fit_image(crop, canvas)
    inside = None
    if mask is not None:
        cut = Image.fromarray((mask > 0).cpu().numpy()).resize(image.size, Image.Resampling.NEAREST).crop(box)
        fitted, _ = fit_image(cut.convert("RGB"), Sizing("pad", canvas.size, resample="bilinear"))
        inside = F.max_pool2d(fitted[:1][None].float() / 255, backbone.stride)
    drawn = _denoise_again(stack_pixels([pixels]), backbone, config, inside)[0]
    x0, y0, x1, y1 = (round(v) for v in placement.content_box)
    array = (drawn[:, y0:y1, x0:x1].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    whole = image.copy()
    whole.paste(Image.fromarray(array).resize(crop.size, Image.Resampling.LANCZOS), box[:2])
    return composite(image, whole, mask, feather=feather)


def _denoise_again(pixels: Tensor, backbone: LatentDiffusion, config: RefineConfig, inside: Tensor | None) -> Tensor:
    """Bring images (B, 3, H, W) in [0, 1] up to noise and down again: (B, 3, H, W), about [0, 1], not clamped.

    `inside`, (1, 1, H / stride, W / stride) in [0, 1], says which latent cells may change; None: all.
    """
    like = backbone.scale(backbone.encode(pixels)[0]).clone()
    clean = like.double()  # exact inversions need it
    context, plain = (backbone.embed(prompt).context.clone() for prompt in (config.prompt, ""))
    first = max(round(config.strength * len(backbone.alphas_cumprod)) - 1, 0)
    times = torch.linspace(first, 0, min(config.steps, first + 1)).round().long().tolist()
    grid = TimeGrid.of(TableVP(backbone.alphas_cumprod.double().cpu().numpy()), [*times, -1]).ending()
    nulls: list[Tensor] = []

    def under(x: Tensor, t: float, prompt: Tensor) -> Tensor:
        # called as it is: gradients flow back to the prompt
        network: Any = backbone.network
        output = network(x.to(like), int(t), encoder_hidden_states=prompt.to(like).expand(len(x), -1, -1)).sample
        return backbone.as_noise(x, output.double(), int(t))

    def guided(x: Tensor, t: float) -> Tensor:
        towards = under(x, t, context)
        if config.guidance == 1:
            return towards
        away = under(x, t, nulls[times.index(int(t))] if nulls else plain)
        return away + config.guidance * (towards - away)

    method = config.inversion
    if method == "none":
        noise = draw_noise(clean.shape[1:], config.seed).to(clean)
        pairs = [(alpha * clean + sigma * noise,) * 2 for alpha, sigma in levels(grid)]
    else:
        source, steps = (context, "ddim") if method == "null-text" else (plain, method)
        pairs = invert(lambda x, t: under(x, t, source), clean, grid, steps)[::-1]
    if method == "null-text":
        pivots = [state for state, _ in reversed(pairs)]
        nulls, _ = optimise_null(under, pivots, grid, context, plain, guidance=config.guidance)
    latents = redraw(guided, pairs, grid, method if method in METHODS else "ddim", inside=inside)
    vae = _decoder_of(backbone)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    decoded: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift).sample
    return decoded.float() / 2 + 0.5


def _decoder_of(backbone: LatentDiffusion) -> Any:
    """The whole VAE of a backbone's folder: extraction has given its decoder away."""
    from diffusers import AutoencoderKL

    from diffrep.backbones.pipelines import load_component

    folder = Path(backbone.source)
    if folder.is_dir() and not (folder / "vae").is_dir():
        raise BackboneError(f"{backbone.source}: has no folder vae/, nothing can be decoded")
    # decoded in float32: some VAEs overflow in half precision
    vae = load_component(AutoencoderKL, backbone.source, "vae", torch.float32)
    return vae.to(backbone.device).eval()


def _square_around(mask: Tensor, size: tuple[int, int], margin: float = 0.15) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a square around the mask with a margin, inside the image of (width, height) where it fits."""
    bounds = []  # (low, high) of x and of y, in pixels of the image
    for axis, length in enumerate(size):
        used = np.flatnonzero((mask > 0).cpu().numpy().any(axis))
        if not len(used):
            raise ValueError("there is nothing to refine: the mask is empty")
        cells = mask.shape[1 - axis]
        bounds.append((used[0] * length / cells, (used[-1] + 1) * length / cells))
    side = (1 + 2 * margin) * max(high - low for low, high in bounds)
    starts = [
        min(max((low + high - side) / 2, 0), max(length - side, 0))
        for (low, high), length in zip(bounds, size, strict=True)
    ]
    ends = [min(length, int(np.ceil(start + side))) for start, length in zip(starts, size, strict=True)]
    return int(starts[0]), int(starts[1]), ends[0], ends[1]
