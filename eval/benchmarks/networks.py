"""Calls of networks with random weights: the plain or published sequence against ours, same weights, dtype and noise.

The plain side runs diffusers' modules, ours those that the package's loaders build of the same weights.

Extraction: the plain way is what one writes without this package: a forward hook on the wanted block, a whole U-Net
pass, the image encoded again for every ensemble member and every pair it appears in.

One-step depth and normals: the plain way is what the released pipelines do for every image: run the text encoder on the
empty prompt, embed timestep and task, project the context to keys and values in every layer, feed E2E-FT's zeros, one
image at a time.

Segmentation: the official sequence predicts mask and edge and decodes both, whatever is asked for. Ours gives the same
two maps, or the mask alone. The official program also runs six passes per image (its ensemble); that is counted, not
timed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffrep.backbones import Conditions, LatentDiffusion, PromptEmbedding, draw_noise
from diffrep.backbones.pipelines import network_class
from diffrep.eval.benchmarks.timing import Claim, PairedBenchmark, Row, count_flops, peak_memory, said_flops
from diffrep.heads.diffdis import DiffDisUNet, branch_vectors
from diffrep.heads.families import FAMILIES, Family
from diffrep.heads.one_step import TIMESTEP, OneStep, Schedule
from diffrep.heads.segmentation import PASSES, DiffDis, ensemble, ensemble_sizes, finish

ENSEMBLE = 8
TOKENS = 2  # of the empty prompt, begin and end
SCHEDULE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
Size = Literal["small", "sd"]


@dataclass(frozen=True)
class NetworkBenchmark(PairedBenchmark):
    """Compare calls of Stable Diffusion 2's networks, at full size (sd) or with narrow layers."""

    size: Size = "small"  # sd: the published architecture at full width
    side: int = 256  # of the images, pixels
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def about(self) -> str:
        """What stands behind each claim."""
        return f"{self.side} px, {self.size} U-Net, {self.dtype} on {self.device}"

    def pixels(self, count: int) -> Tensor:
        """(count, 3, side, side): the same random images each time."""
        return torch.rand(count, 3, self.side, self.side, generator=torch.Generator().manual_seed(0)).to(self.device)


@contextmanager
def random_weights(device: str) -> Iterator[None]:
    """The same random weights each time: the libraries' initialisation draws from the global generator."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        yield


def unet_config(size: Size, **options: Any) -> dict[str, Any]:
    """Stable Diffusion 2's U-Net, as diffusers names its settings."""
    width = 320 if size == "sd" else 64
    heads = (5, 10, 20, 20) if size == "sd" else (1, 2, 4, 4)
    widths = (width, 2 * width, 4 * width, 4 * width)
    return {"block_out_channels": widths, "attention_head_dim": heads, "use_linear_projection": True, **options}


def random_unet(size: Size, **options: Any) -> Any:
    """Stable Diffusion 2's U-Net."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**unet_config(size, **options))


def random_vae(size: Size) -> Any:
    """Stable Diffusion's VAE."""
    from diffusers import AutoencoderKL

    width = 128 if size == "sd" else 32
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2,
    )


@torch.no_grad()
def as_loaded(module: Any) -> Any:
    """A copy of a network of diffusers, of the class that the package's loaders build for its configuration."""
    with torch.device("meta"):
        network = network_class(type(module).__name__, module.config)(dict(module.config))
    network.load_state_dict({name: value.clone() for name, value in module.state_dict().items()}, assign=True)
    return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class FeaturesBenchmark(NetworkBenchmark):
    """Compare extraction with a plain full forward pass on a random-weight U-Net."""

    tap: str = "up.1"
    images: int = 4  # of the set that is matched in all pairs

    def claims(self) -> Iterator[Claim]:
        published = random_backbone(self.size, self.device, getattr(torch, self.dtype))
        parts = as_loaded(published.network), as_loaded(published.vae)
        backbone = LatentDiffusion(*parts, published.alphas_cumprod, name=published.name)
        backbone.embed("", published.embed(""))
        pixels = self.pixels(self.images)
        one, eight = (Conditions(timestep=261, ensemble=n, posterior="sample") for n in (1, ENSEMBLE))
        pairs = list(itertools.combinations(range(self.images), 2))

        def ours(batch: Tensor, conditions: Conditions) -> Tensor:
            return backbone.maps(batch, [self.tap], conditions)[self.tap]

        def plain(batch: Tensor, conditions: Conditions) -> Tensor:
            return torch.cat([plain_extraction(published, image[None], self.tap, conditions) for image in batch])

        def exact() -> Tensor:
            return plain_extraction(copy.deepcopy(published).float(), pixels[:1], self.tap, one)

        def our_pairs() -> Tensor:
            maps = ours(pixels, one)
            return torch.cat([maps[list(pair)] for pair in pairs])

        about = f"tap {self.tap}, {self.about}"
        rounded = exact if self.dtype != "float32" else None
        for claim, batch, conditions, right in (
            ("one image", pixels[:1], one, rounded),
            (f"one image, ensemble of {ENSEMBLE}", pixels[:1], eight, None),
            ("a pair", pixels[:2], one, None),
        ):
            sides = partial(plain, batch, conditions), partial(ours, batch, conditions)
            yield Claim(f"{claim}, {about}", *sides, exact=right)
        yield Claim(
            f"one image, ensemble of {ENSEMBLE} copies in one batch, {about}",
            lambda: plain_extraction(published, pixels[:1], self.tap, eight, together=True),
            partial(ours, pixels[:1], eight),
        )
        yield Claim(
            f"{self.images} images in all {len(pairs)} pairs, {about}",
            lambda: torch.cat([plain(pixels[list(pair)], one) for pair in pairs]),
            our_pairs,
        )


def random_backbone(size: Size, device: str, dtype: torch.dtype) -> LatentDiffusion:
    """Stable Diffusion 2.1's architecture with random weights."""
    from diffusers import DDIMScheduler

    with random_weights(device):
        unet, vae = random_unet(size, cross_attention_dim=1024), random_vae(size)
        prompt = torch.randn(1, 77, 1024, dtype=dtype)
    scheduler: Any = DDIMScheduler(**SCHEDULE)
    backbone = LatentDiffusion(unet.to(dtype), vae.to(dtype), scheduler.alphas_cumprod, name=f"random {size}")
    backbone.embed("", PromptEmbedding(prompt))
    return backbone


@torch.inference_mode()
def plain_extraction(
    backbone: LatentDiffusion, image: Tensor, tap: str, conditions: Conditions, *, together: bool = False
) -> Tensor:
    """The published structure: every member encodes the image and runs the whole U-Net, a hook keeps the map.

    Args:
        together: the members are copies of the image in one batch, as DIFT runs them.
    """
    maps: list[Tensor] = []
    module = backbone.network.get_submodule(backbone.tap(tap).module)
    handle = module.register_forward_hook(lambda m, i, output: maps.append(output))
    context = backbone.embed(conditions.prompt).context.to(backbone.device, backbone.dtype)
    members = list(range(conditions.ensemble))
    for batch in [members] if together else [[member] for member in members]:
        copies = image.expand(len(batch), -1, -1, -1)
        posterior = backbone.vae.encode(copies.to(backbone.dtype) * 2 - 1).latent_dist
        shape = posterior.mean.shape[1:]
        first, added = (
            torch.cat([draw_noise(shape, conditions.seed, m, stream=stream) for m in batch]) for stream in (1, 0)
        )
        spread = posterior.std * first.to(posterior.std)
        latents = backbone.noisy(posterior.mean, spread, added, conditions.timestep)
        backbone.network(latents, conditions.timestep, encoder_hidden_states=context.expand(len(batch), -1, -1))
    handle.remove()
    return torch.cat(maps).float().mean(0, keepdim=True).to(backbone.dtype)


@dataclass(frozen=True)
class DepthBenchmark(NetworkBenchmark):
    """Compare a one-step head with the official sequence of calls, on random weights."""

    side: int = 128  # of the images, pixels
    images: int = 4  # that ours takes in one batch, and the official pipelines one by one
    families: tuple[str, ...] = ("lotus-d", "lotus-g", "e2e-ft")

    def run(self) -> list[Row]:
        """Time and count both sides, print the table and return its rows."""
        rows = super().run()
        print(f"peak memory of the process {peak_memory():.0f} MB, of both sides and their weights")
        return rows

    def claims(self) -> Iterator[Claim]:
        for name in self.families:
            yield from self._claims(FAMILIES[name])

    def _claims(self, family: Family) -> Iterator[Claim]:
        parts = random_parts(self.size, family, self.device, getattr(torch, self.dtype))
        pixels, latent = self.pixels(self.images), self.side // 8
        noise = torch.randn(1, 4, latent, latent, generator=torch.Generator().manual_seed(1))
        noise = noise.to(self.device, parts.dtype)
        first = noise if family.first_latent == "noise" else None
        ours = OneStep(as_loaded(parts.unet), as_loaded(parts.vae), parts.context(), parts.schedule, family)
        weights = [megabytes(parts.unet, parts.vae, parts.text), megabytes(ours.network, parts.vae)]

        def official_side(batch: Tensor) -> Tensor:
            return torch.cat([official(parts, family, image[None], noise) for image in batch])

        @torch.inference_mode()
        def our_side(batch: Tensor) -> Tensor:
            return ours.draw_maps(ours.predict(ours.encode(batch), first), batch)

        def said(plain: float, our: float) -> str:
            return f"{said_flops(plain, our)}; weights {weights[0]:.0f} MB against {weights[1]:.0f} MB"

        @torch.inference_mode()
        def our_latent() -> Tensor:
            return ours.predict(noise, first)

        def exact() -> Tensor:
            return official(parts.float32(), family, pixels[:1], noise.float())

        yield Claim(
            f"{family.name}, everything but the VAE, {self.about}",
            partial(official_latent, parts, family, noise, noise),
            our_latent,
            said,
        )
        rounded = exact if self.dtype != "float32" else None
        for what, batch, right in (("one image", pixels[:1], rounded), (f"{self.images} images", pixels, None)):
            sides = partial(official_side, batch), partial(our_side, batch)
            yield Claim(f"{family.name}, {what}, {self.about}", *sides, said, right)


@dataclass(frozen=True)
class RandomParts:
    """The modules of a Stable Diffusion 2 folder, with random weights."""

    unet: Any
    vae: Any
    text: Any
    schedule: Schedule
    dtype: torch.dtype

    def float32(self) -> RandomParts:
        """Copies with the same weights in float32."""
        unet, vae, text = (copy.deepcopy(module).float() for module in (self.unet, self.vae, self.text))
        return RandomParts(unet, vae, text, self.schedule, torch.float32)

    @torch.inference_mode()
    def context(self) -> Tensor:
        """The text encoder's output for the two tokens of the empty prompt."""
        return self.text(torch.arange(TOKENS, device=self.text.device)[None])[0]


def random_parts(size: Size, family: Family, device: str, dtype: torch.dtype) -> RandomParts:
    """Stable Diffusion 2's architecture for a family."""
    from transformers import CLIPTextConfig, CLIPTextModel

    full = size == "sd"
    width, heads = (1024, 16) if full else (128, 4)
    with random_weights(device):
        unet = random_unet(
            size,
            in_channels=4 if family.first_latent == "none" else 8,
            cross_attention_dim=width,
            class_embed_type="projection" if family.task_vector else None,
            projection_class_embeddings_input_dim=4 if family.task_vector else None,
        )
        vae = random_vae(size)
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=23 if full else 4,
            num_attention_heads=heads,
            vocab_size=49408 if full else 512,
            bos_token_id=0,
            eos_token_id=1,
        )
        text: Any = CLIPTextModel(config)
    for module in (unet, vae, text):
        module.eval().requires_grad_(False)
        if dtype != torch.float32:  # diffusers warns about a cast even when it is none
            module.to(dtype)
    predicts = "sample" if family.result == "output" else "v_prediction"
    schedule = Schedule.from_config({**SCHEDULE, "set_alpha_to_one": False, "prediction_type": predicts})
    return RandomParts(unet, vae, text, schedule, dtype)


@torch.inference_mode()
def official_latent(parts: RandomParts, family: Family, latent: Tensor, noise: Tensor) -> Tensor:
    """The published structure between encoder and decoder: encode the prompt, embed the constants, one U-Net call."""
    context = parts.context()
    inputs = latent
    if family.first_latent != "none":
        first = noise if family.first_latent == "noise" else torch.zeros_like(noise)
        inputs = torch.cat([latent, first], dim=1)
    labels = None if family.task_vector is None else latent.new_tensor([family.task_vector])
    output: Tensor = parts.unet(inputs, TIMESTEP, encoder_hidden_states=context, class_labels=labels).sample
    if family.result == "clean":
        return parts.schedule.clean(output, torch.zeros_like(output), TIMESTEP)
    return output


@torch.inference_mode()
def official(parts: RandomParts, family: Family, image: Tensor, noise: Tensor) -> Tensor:
    """One image through the published structure; the posterior's mean, so that both sides decode one latent."""
    latent = parts.vae.encode(image.to(parts.dtype) * 2 - 1).latent_dist.mean * parts.vae.config.scaling_factor
    annotation = official_latent(parts, family, latent, noise)
    return parts.vae.decode(annotation / parts.vae.config.scaling_factor).sample


def megabytes(*modules: Any) -> float:
    """Memory of the parameters and buffers of modules."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


@dataclass(frozen=True)
class SegmentationBenchmark(NetworkBenchmark):
    """Compare DiffDIS' official pass with ours: mask and edge, and the mask alone."""

    def claims(self) -> Iterator[Claim]:
        published = published_head(self.device, getattr(torch, self.dtype), size=self.size)
        unet, vae = copy.deepcopy(published.unet), as_loaded(published.vae)
        head = DiffDis(unet, vae, published.context, published.schedule)
        pixels = self.pixels(1)
        noise = head.draw((self.side, self.side), 0).to(self.device, head.dtype)
        noises = [head.draw(size, 0, n) for n, size in enumerate(ensemble_sizes((self.side,) * 2, head.multiple) * 2)]

        @torch.inference_mode()
        def six_passes() -> Tensor:
            return ensemble(head, pixels, noises[:PASSES], edges=True)[0]

        @torch.inference_mode()
        def both() -> Tensor:
            mask, edge = head.forward(pixels, noise, edges=True)
            assert edge is not None
            return torch.cat([finish(mask), finish(edge)])

        @torch.inference_mode()
        def mask_alone() -> Tensor:
            return finish(head.forward(pixels, noise)[0])

        passes = count_flops(six_passes) / 1e9
        sides: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "mask and edge": (lambda: official_pass(published, pixels, noise), both),
            "mask alone": (lambda: official_pass(published, pixels, noise)[:1], mask_alone),
        }
        for what, (official, ours) in sides.items():
            memory = ""
            if self.device != "cpu":
                memory = f"; peak memory MiB {_peak(official):.0f} against {_peak(ours):.0f}"

            def said(plain: float, our: float, memory: str = memory) -> str:
                fewer = f"{1 - our / plain:.0%} fewer; the official program's {PASSES} passes: {passes:.1f}"
                return f"GFLOP {plain:.1f} against {our:.1f} ({fewer}){memory}"

            yield Claim(f"{what}, {self.about}", official, ours, said)


@torch.inference_mode()
def official_pass(head: DiffDis, pixels: Tensor, noise: Tensor) -> Tensor:
    """DiffDIS' published pipeline, call by call: (2, 1, H, W), mask and edge, stretched to [0, 1]."""
    vae, unet, factor = head.vae, head.unet, head.vae.config.scaling_factor
    latents = []
    for level in range(unet.levels + 1):
        view = pixels if level == 0 else F.interpolate(pixels, scale_factor=0.5**level, mode="bilinear")
        latents.append(vae.encode(view.to(vae.dtype) * 2 - 1).latent_dist.mean * factor)
    doubled = [latent.repeat(2, 1, 1, 1) for latent in latents]
    start = noise.repeat(2, 1, 1, 1).to(latents[0])
    output = unet_both(unet, doubled, start, head.context)
    clean = head.schedule.clean(output, start, TIMESTEP)
    decoded = [vae.decode((row / factor)[None].to(vae.dtype)).sample.mean(1, keepdim=True) for row in clean]
    return torch.cat([finish(raw.float()) for raw in decoded])


def unet_both(unet: DiffDisUNet, latents: list[Tensor], noise: Tensor, context: Tensor) -> Tensor:
    """The U-Net as published: every row is computed to its end, conditions are computed for every row."""
    rows = len(noise)
    vectors = branch_vectors(rows // 2).to(noise)
    steps = torch.full((rows,), TIMESTEP, device=noise.device)
    embedding = unet.time_embedding(unet.time_proj(steps).to(noise.dtype)) + unet.class_embedding(vectors)
    states = context.repeat(rows, 1, 1)
    hidden = unet.conv_in(torch.cat([latents[0], noise], dim=1))
    skips: list[Any] = [hidden]
    for number, block in enumerate(unet.down_blocks):
        named = {"encoder_hidden_states": states} if getattr(block, "has_cross_attention", False) else {}
        hidden, residuals = block(hidden_states=hidden, temb=embedding, **named)
        skips += residuals
        if number < unet.levels:
            condition = unet.rgb_conv[number](latents[number + 1])
            skips[-1] = skips[-1] * unet.rgb_proj[number](condition) + unet.rgb_proj1[number](condition) + skips[-1]
    hidden = unet.mid_block(hidden, embedding, encoder_hidden_states=states)
    up: Any
    for up in unet.up_blocks:
        count = len(up.resnets)
        named = {"encoder_hidden_states": states} if getattr(up, "has_cross_attention", False) else {}
        hidden = up(hidden_states=hidden, temb=embedding, res_hidden_states_tuple=tuple(skips[-count:]), **named)
        skips = skips[:-count]
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def published_head(device: str, dtype: torch.dtype = torch.float32, *, size: Size = "sd") -> DiffDis:
    """DiffDIS on SD-Turbo's architecture with random weights; on the device "meta" it computes nothing."""
    with random_weights(device):
        unet = DiffDisUNet(unet_config(size, cross_attention_dim=1024, out_channels=4))
        vae, context = random_vae(size), torch.randn(1, 2, 1024)
    for module in (unet, vae):
        torch.nn.Module.to(module, dtype=dtype)
        module.eval().requires_grad_(False)
    return DiffDis(unet, vae, context.to(dtype), Schedule.from_config({**SCHEDULE, "prediction_type": "epsilon"}))


def _peak(run: Callable[[], object]) -> float:
    """MiB that a function adds to what is allocated on the GPU."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
