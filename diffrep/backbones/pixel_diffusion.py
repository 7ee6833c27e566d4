"""Pixel diffusion as a backbone: a diffusers `UNet2DModel`, or a checkpoint of openai/guided-diffusion (ADM) as one.

Beside the names of `unet`, taps are ``block.N``, N = 1, 2, ... in the order of guided-diffusion: the input
blocks, the middle block, the output blocks, each behind its attention and its resampling. With six levels of two
layers that is 1..37; DIFT's index k, which counts output blocks from 0, is ``block.(20 + k)``, see `dift_tap`.

guided-diffusion's network is the same under other names; only attention's joint projection is stored in another order.
What the tensors' shapes cannot tell (width of the heads, order of the attention, groups of the norms, schedule) comes
from the flags that the project prints beside each checkpoint; without flags they are those of the public 256 x 256
models, and of the 64 x 64 model where its shape is met.

Source: openai/guided-diffusion 22e0df8, guided_diffusion/unet.py and script_util.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffrep.backbones.base import BackboneError, Conditions, Recommended, TapError
from diffrep.backbones.diffusion import DiffusionBackbone, class_labels
from diffrep.backbones.unet import reading_taps, unet_taps
from diffrep.backbones.weight_files import read_weights
from diffrep.files import one_line
from diffrep.images import Sizing


def numbered_blocks(unet: Any) -> list[str]:
    """Paths of the modules whose outputs guided-diffusion numbers, in its order."""

    def layers(block: Any, path: str) -> Iterator[str]:
        kind = "attentions" if getattr(block, "attentions", None) else "resnets"
        yield from (f"{path}.{kind}.{r}" for r in range(len(block.resnets)))

    paths = ["conv_in"]
    for i, block in enumerate(unet.down_blocks):
        paths += layers(block, f"down_blocks.{i}")
        if block.downsamplers:
            paths.append(f"down_blocks.{i}.downsamplers.0")
    paths.append("mid_block")
    for i, block in enumerate(unet.up_blocks):
        paths += layers(block, f"up_blocks.{i}")
        if block.upsamplers:
            paths[-1] = f"up_blocks.{i}.upsamplers.0"
    return paths


class PixelDiffusion(DiffusionBackbone):
    """A frozen U-Net that denoises pixels.

    Args:
        unet: diffusers `UNet2DModel`; its pixels run from -1 to 1.
        alphas_cumprod: (T,) the schedule's cumulative product, indexed by the timestep.
    """

    denoises, has_unet = "pixels", True

    def __init__(
        self, unet: Any, alphas_cumprod: Tensor, *, name: str = "pixel diffusion", source: str = "random"
    ) -> None:
        super().__init__(unet, alphas_cumprod, name=name, source=source)
        self.classes: int | None = unet.config.num_class_embeds
        self.takes |= {"label"} if self.classes is not None else set()
        self.multiple = 2 ** (len(unet.config.block_out_channels) - 1)
        paths = numbered_blocks(unet)
        self._first_output = paths.index("mid_block") + 2
        self._output_blocks = len(paths) - paths.index("mid_block") - 1
        self._taps = {}
        for tap in unet_taps(unet, 1).values():
            self._taps[tap.name] = tap
            if tap.module in paths and tap.name != "in":
                number = f"block.{paths.index(tap.module) + 1}"
                self._taps[number] = replace(tap, name=number)
        # DIFT: index 4 at twice the training size, t = 101, eight draws
        self.recommended = Recommended(
            taps=(self.dift_tap(min(4, self._output_blocks - 1)),),
            sizing=Sizing("squash", 2 * int(unet.config.sample_size or 256), multiple=self.multiple),
            conditions=Conditions(timestep=101, ensemble=8),
        )

    def dift_tap(self, index: int) -> str:
        """The tap of DIFT's `up_ft_index`: the output blocks counted from 0.

        Raises:
            TapError: there are fewer output blocks.
        """
        if not 0 <= index < self._output_blocks:
            raise TapError(f"{self.name} has output blocks 0..{self._output_blocks - 1}, got index {index}")
        return f"block.{self._first_output + index}"

    def noisy_pixels(self, pixels: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise, x in [-1, 1].

        Args:
            pixels: (B, 3, H, W), RGB in [0, 1].
            noise: (B or 1, 3, H, W).
            timestep: one, or (B,) one per image.
        """
        alpha = self.alphas_cumprod[timestep].view(-1, 1, 1, 1).to(noise)
        return alpha.sqrt() * (pixels.to(noise) * 2 - 1) + (1 - alpha).sqrt() * noise

    def encode(self, pixels: Tensor, *, batch_size: int = 8) -> tuple[Tensor, None]:
        """The pixels themselves."""
        return pixels.float(), None

    def noisy(self, mean: Tensor, spread: Tensor | None, noise: Tensor | None, timestep: int) -> Tensor:
        return mean * 2 - 1 if noise is None else self.noisy_pixels(mean, noise.to(mean), timestep)

    def network_maps(self, noisy: Tensor, taps: Sequence[str], conditions: Conditions) -> dict[str, Tensor]:
        """`unet_maps` at the timestep and with the label of the conditions; gradients flow to hooks inside."""
        labels = None if conditions.label is None else torch.full((len(noisy),), conditions.label)
        return self.unet_maps(noisy, taps, max(conditions.timestep, 0), labels=labels)

    def painted_under(self, condition: Any, negative: str) -> tuple[list[Any], Any]:
        return class_labels(self.name, condition, self.classes, negative) or [None], None

    def predicted(self, states: Tensor, timestep: float, conditions: Sequence[Any]) -> Tensor:
        classes = {} if self.classes is None else {"class_labels": torch.tensor(list(conditions), device=self.device)}

        def run(noisy: Tensor, step: Tensor, *labels: Tensor) -> Tensor:
            return self.network(noisy, step, **dict(zip(classes, labels, strict=True))).sample

        step = torch.full((1,), timestep, device=self.device)
        inputs = states.to(self.device, self.dtype), step, *classes.values()
        output: Tensor = self.graphs("predicted", run, *inputs)
        return output[:, : states.shape[1]]

    def decode(self, states: Tensor) -> Tensor:
        return states / 2 + 0.5

    def unet_maps(
        self, noisy: Tensor, taps: Sequence[str], timestep: int | Tensor, *, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run the U-Net on (B, 3, H, W) noisy pixels in [-1, 1], up to the deepest tap.

        Args:
            timestep: one, or (B,) one per image.
            labels: (B,) classes; needed by class-conditional networks, ignored by others.
        """
        classes: dict[str, Any] = {}
        if self.classes is not None:
            if labels is None:
                raise ValueError(f"{self.name} is class-conditional: say a label, 0..{self.classes - 1}")
            if not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
                got = sorted(set(labels.tolist()))
                raise ValueError(f"{self.name} has the classes 0..{self.classes - 1}, got {got}")
            classes = {"class_labels": labels.to(self.device)}
        steps = timestep.to(self.device) if isinstance(timestep, Tensor) else torch.full((1,), timestep).to(self.device)

        def run(noisy: Tensor, steps: Tensor, *labels: Tensor) -> dict[str, Tensor]:
            with reading_taps(self.network, [self.tap(tap) for tap in taps], noisy.shape) as maps:
                self.network(noisy, steps, **dict(zip(classes, labels, strict=True)))
            return maps

        inputs = noisy.to(self.device, self.dtype), steps, *classes.values()
        return self.graphs(tuple(taps), run, *inputs)


FLAGS = {  # guided-diffusion's flag -> field here
    "num_head_channels": "head_channels",
    "num_heads": "heads",
    "use_new_attention_order": "new_attention_order",
    "use_scale_shift_norm": "scale_shift",
    "resblock_updown": "updown",
    "noise_schedule": "schedule",
    "norm_groups": "norm_groups",
    "image_size": "image_size",
}


@dataclass(frozen=True, kw_only=True)
class AdmArchitecture:
    """Everything that makes an ADM U-Net.

    Attributes:
        widths: channels of each level, finest first.
        layers: residual blocks of a level (the decoder has one more).
        attention: whether a level has self-attention.
        scale_shift: the time embedding scales and shifts (else it is added).
        updown: resampling by residual blocks (else by a convolution).
        heads: number of attention heads where their width follows from it; None: `head_channels` each.
        norm_groups: 32 in every published model.
    """

    widths: tuple[int, ...]
    layers: int
    attention: tuple[bool, ...]
    in_channels: int = 3
    out_channels: int = 6
    scale_shift: bool = True
    updown: bool = True
    classes: int | None = None
    head_channels: int = 64
    heads: int | None = None
    new_attention_order: bool = False
    norm_groups: int = 32
    image_size: int = 256
    schedule: Literal["linear", "cosine"] = "linear"

    @classmethod
    def infer(cls, shapes: Mapping[str, Sequence[int]], flags: Mapping[str, Any] | None = None) -> AdmArchitecture:
        """Read the architecture off the shapes of a checkpoint.

        Args:
            shapes: name in guided-diffusion's grammar -> shape.
            flags: by guided-diffusion's names, for what shapes do not tell; they win over what is inferred.

        Raises:
            BackboneError: no ADM checkpoint, or one whose network `UNet2DModel` cannot be.
        """
        try:
            values = _inferred(shapes)
        except KeyError as error:
            raise BackboneError(f"is no guided-diffusion U-Net: {error.args[0]} is missing") from None
        values |= {FLAGS[flag]: value for flag, value in (flags or {}).items() if flag in FLAGS and value is not None}
        if values["head_channels"] > 0:
            values["heads"] = None
        elif not values["heads"]:
            raise BackboneError("needs num_heads or num_head_channels")
        architecture = cls(**values)
        architecture._check(int(shapes["time_embed.0.weight"][1]))
        return architecture

    def _check(self, embedded: int) -> None:
        if self.schedule not in ("linear", "cosine"):
            raise BackboneError(f"noise_schedule must be linear or cosine, got {self.schedule!r}")
        if embedded != self.widths[0]:
            raise BackboneError(
                f"its first level is {self.widths[0]} wide but its timestep embedding {embedded}"
                " (the 512 x 512 model is built so): diffusers' UNet2DModel ties the two"
            )
        if any(width % self.norm_groups for width in self.widths):
            raise BackboneError(
                f"levels of {', '.join(map(str, self.widths))} channels do not split into {self.norm_groups} groups:"
                " say norm_groups"
            )
        with_attention = {w for w, a in zip(self.widths, self.attention, strict=True) if a} | {self.widths[-1]}
        split = self.heads or self.head_channels
        if any(width % split for width in with_attention):
            what = "num_heads" if self.heads else "num_head_channels"
            raise BackboneError(f"attention over {sorted(with_attention)} channels does not split by {what} {split}")

    def diffusers_config(self) -> dict[str, Any]:
        """The arguments of `UNet2DModel`."""
        down = ("AttnDownBlock2D", "ResnetDownsampleBlock2D" if self.updown else "DownBlock2D")
        up = ("AttnUpBlock2D", "ResnetUpsampleBlock2D" if self.updown else "UpBlock2D")
        return {
            "sample_size": self.image_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "time_embedding_type": "positional",
            "freq_shift": 0,
            "flip_sin_to_cos": True,
            "block_out_channels": list(self.widths),
            "layers_per_block": self.layers,
            "down_block_types": [down[0] if a else down[1] for a in self.attention],
            "up_block_types": [up[0] if a else up[1] for a in reversed(self.attention)],
            "downsample_type": "resnet" if self.updown else "conv",
            "upsample_type": "resnet" if self.updown else "conv",
            "downsample_padding": 1,
            "attention_head_dim": self.head_channels if self.heads is None else self.widths[-1] // self.heads,
            "norm_num_groups": self.norm_groups,
            "attn_norm_num_groups": self.norm_groups,
            "norm_eps": 1e-5,
            "resnet_time_scale_shift": "scale_shift" if self.scale_shift else "default",
            "add_attention": True,
            "act_fn": "silu",
            "dropout": 0.0,
            "num_class_embeds": self.classes,
        }

    def build(self) -> nn.Module:
        """The network with fresh weights."""
        from diffusers import UNet2DModel

        unet: Any = UNet2DModel(**self.diffusers_config())
        for module in unet.modules() if self.heads is not None else ():
            if type(module).__name__ == "Attention":  # UNet2DModel knows one width of heads for all levels
                module.heads = self.heads
                module.scale = (module.to_q.out_features // self.heads) ** -0.5
        return unet

    def alphas_cumprod(self) -> Tensor:
        """(1000,) of the training schedule, computed in float64."""
        if self.schedule == "linear":
            betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        else:
            share = torch.arange(1001, dtype=torch.float64) / 1000
            bar = ((share + 0.008) / 1.008 * torch.pi / 2).cos().square()
            betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        return (1 - betas).cumprod(0).float()


def _inferred(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The fields of an `AdmArchitecture` that shapes tell, and those of the public models that they resemble."""

    def upsamples(index: int) -> bool:
        block = f"output_blocks.{index}."
        behind = [k for k in shapes if k.startswith(block) and not k.startswith(f"{block}0.")]
        return any(k.endswith((".in_layers.2.weight", ".conv.weight")) for k in behind)

    blocks = 1 + max((int(k.split(".")[1]) for k in shapes if k.startswith("output_blocks.")), default=-1)
    layers = next((i for i in range(blocks) if upsamples(i)), blocks - 1)
    levels = [1 + level * (layers + 1) for level in range(blocks // (layers + 1) if layers >= 0 else 0)]
    first = "input_blocks.1.0"
    widths = tuple(int(shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0]) for i in levels)
    classes = int(shapes["label_emb.weight"][0]) if "label_emb.weight" in shapes else None
    inferred: dict[str, Any] = {
        "widths": widths,
        "layers": layers,
        "attention": tuple(f"input_blocks.{i}.1.qkv.weight" in shapes for i in levels),
        "in_channels": int(shapes["input_blocks.0.0.weight"][1]),
        "out_channels": int(shapes["out.2.weight"][0]),
        "scale_shift": shapes[f"{first}.emb_layers.1.weight"][0] == 2 * shapes[f"{first}.out_layers.3.weight"][0],
        "updown": not any(k.endswith(".0.op.weight") for k in shapes),
        "classes": classes,
        "head_channels": 64,
        "heads": None,
    }
    if classes and widths[0] == 192 and layers == 3:  # 64x64_diffusion.pt
        inferred |= {"new_attention_order": True, "schedule": "cosine", "image_size": 64}
    if classes and widths == (256, 256, 512, 768, 1024):  # 128x128_diffusion.pt
        inferred |= {"head_channels": -1, "heads": 4, "image_size": 128}
    return inferred


def _modules(architecture: AdmArchitecture) -> Iterator[tuple[str, str]]:
    """(prefix in guided-diffusion, prefix in diffusers) of every residual, attention and resampling module."""
    per, count = architecture.layers + 1, len(architecture.widths)
    for level in range(count):
        for r in range(architecture.layers):
            block = f"input_blocks.{1 + level * per + r}"
            yield f"{block}.0", f"down_blocks.{level}.resnets.{r}"
            if architecture.attention[level]:
                yield f"{block}.1", f"down_blocks.{level}.attentions.{r}"
        if level < count - 1:
            yield f"input_blocks.{(level + 1) * per}.0", f"down_blocks.{level}.downsamplers.0"
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"
    for i in range(count * per):
        u, r = divmod(i, per)
        attention = architecture.attention[count - 1 - u]
        yield f"output_blocks.{i}.0", f"up_blocks.{u}.resnets.{r}"
        if attention:
            yield f"output_blocks.{i}.1", f"up_blocks.{u}.attentions.{r}"
        if r == architecture.layers and u < count - 1:
            yield f"output_blocks.{i}.{2 if attention else 1}", f"up_blocks.{u}.upsamplers.0"


ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
RES_BLOCK = {  # of guided-diffusion, and of latent diffusion, which took it over
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
INSIDE = RES_BLOCK | {
    "op": "conv",
    "conv": "conv",
    "norm": "group_norm",
    "proj_out": "to_out.0",
}


def convert(weights: Mapping[str, Tensor], architecture: AdmArchitecture) -> dict[str, Tensor]:
    """guided-diffusion's state dict -> `UNet2DModel`'s.

    Raises:
        BackboneError: a tensor has no place in the network.
    """
    names = dict(_modules(architecture))
    converted: dict[str, Tensor] = {}
    for key, value in weights.items():
        path, _, kind = key.rpartition(".")
        if path in ENDS:
            converted[f"{ENDS[path]}.{kind}"] = value
            continue
        block = next((p for p in (path, path.rpartition(".")[0], ".".join(path.split(".")[:-2])) if p in names), "")
        inner = path.removeprefix(f"{block}.")
        if not block or inner not in {*INSIDE, "qkv"}:
            raise BackboneError(f"the tensor {key} has no place in the network that the other tensors describe")
        if inner == "qkv":
            for part, tensor in zip("qkv", _split_qkv(value, architecture), strict=True):
                converted[f"{names[block]}.to_{part}.{kind}"] = tensor
        else:
            squeezed = value.squeeze(-1) if inner == "proj_out" and kind == "weight" else value
            converted[f"{names[block]}.{INSIDE[inner]}.{kind}"] = squeezed
    return converted


def _split_qkv(joint: Tensor, architecture: AdmArchitecture) -> tuple[Tensor, ...]:
    """(3 C, C, 1) or (3 C,) -> queries, keys and values, (C, C) or (C,)."""
    joint = joint.squeeze(-1) if joint.ndim == 3 else joint
    if architecture.new_attention_order:
        return joint.chunk(3)
    channels = joint.shape[0] // 3
    heads = architecture.heads or channels // architecture.head_channels
    return tuple(part.flatten(0, 1) for part in joint.unflatten(0, (heads, 3, -1)).unbind(1))


def adm_backbone(
    weights: Mapping[str, Tensor], flags: Mapping[str, Any] | None = None, *, name: str, source: str = "a state dict"
) -> PixelDiffusion:
    """A backbone from a state dict with guided-diffusion's names.

    Args:
        flags: by guided-diffusion's names, for what the shapes do not tell; see `AdmArchitecture.infer`.

    Raises:
        BackboneError: the tensors make no ADM U-Net, or do not fit the flags.
    """
    try:
        architecture = AdmArchitecture.infer({key: tuple(value.shape) for key, value in weights.items()}, flags)
        unet = architecture.build()
        unet.load_state_dict(convert(weights, architecture))
    except (BackboneError, RuntimeError) as error:
        raise BackboneError(f"{source}: {one_line(error)}") from None
    return PixelDiffusion(unet, architecture.alphas_cumprod(), name=name, source=source)


def load_adm(path: Path, flags: Mapping[str, Any] | None = None, *, name: str | None = None) -> PixelDiffusion:
    """Load a checkpoint: ``.pt`` as published (tensors only, no code is run), or safetensors.

    Raises:
        BackboneError: the file is no ADM checkpoint.
    """
    return adm_backbone(read_weights(path), flags, name=name or str(path), source=str(path))
