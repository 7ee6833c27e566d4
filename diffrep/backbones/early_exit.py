"""Early exit by estimated uncertainty (DeeDiff, Tang et al. 2023) on a U-ViT.

The authors published no code; keys and rules are those of the reproduction of Matisan et al. (DuoDiff, 2024), whose
authors could not reach the paper's trade of quality for time. A fixed depth for each step saves as much without probes:
`limit`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones.base import BackboneError, check_weights
from diffrep.backbones.weight_files import read_weights
from diffrep.files import one_line, read_document, save_weights, write_document
from diffrep.settings import POSITIVE, check


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float, *, bias: bool, skip: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=bias), "proj": nn.Linear(width, width)})
        hidden = int(width * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(2, 3)
        x = x + self.attn["proj"](F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class _OutputHead(nn.Module):
    """Tokens to an image: what the network ends with, and each layer of an early exit."""

    def __init__(self, width: int, patch: int, channels: int, extra: int, side: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1)
        self.extra, self.patch, self.side = extra, patch, side

    def forward(self, x: Tensor) -> Tensor:
        patches = self.decoder_pred(self.norm(x))[:, self.extra :]
        grid = patches.unflatten(1, (self.side, self.side)).unflatten(-1, (self.patch, self.patch, -1))
        return self.final_layer(grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3))


class _UViT(_OutputHead):
    """U-ViT (Bao et al. 2023): its parts under the published names."""

    def __init__(self, about: UViTConfig) -> None:
        width, side = about.embed_dim, about.img_size // about.patch_size
        super().__init__(width, about.patch_size, about.in_chans, about.extras, side)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(about.in_chans, width, about.patch_size, about.patch_size)})
        self.pos_embed = nn.Parameter(torch.zeros(1, about.extras + side**2, width))
        self.time_embed = nn.Identity() if not about.mlp_time_embed else nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
        )  # fmt: skip
        if about.num_classes > 0:
            self.label_emb = nn.Embedding(about.num_classes, width)

        def blocks(count: int, *, skip: bool) -> nn.ModuleList:
            return nn.ModuleList(
                _Block(width, about.num_heads, about.mlp_ratio, bias=about.qkv_bias, skip=skip) for _ in range(count)
            )

        self.in_blocks, self.out_blocks = blocks(about.depth // 2, skip=False), blocks(about.depth // 2, skip=True)
        self.mid_block = blocks(1, skip=False)[0]


@dataclass(frozen=True)
class UViTConfig:
    """Sizes of a U-ViT, by the names of its published configurations."""

    img_size: int = 32
    patch_size: int = 2
    in_chans: int = 3
    embed_dim: int = 512
    depth: int = 13
    num_heads: int = 8
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    num_classes: int = -1
    normalize_timesteps: bool = False

    def __post_init__(self) -> None:
        check(
            self, img_size="1..", patch_size="1..", in_chans="1..", embed_dim="1..", depth="1..", num_heads="1..",
            mlp_ratio=POSITIVE,
        )  # fmt: skip

    @property
    def extras(self) -> int:
        """Tokens before those of the image."""
        return 2 if self.num_classes > 0 else 1


@dataclass(frozen=True)
class LayerOutputs:
    """What every layer of an early-exit network gives.

    Attributes:
        full: (B, C, H, W) the network's own output.
        outputs: (depth, B, C, H, W) the output heads on the input of each block.
        uncertainty: (depth, B) in 0..1, what the probes say of them.
    """

    full: Tensor
    outputs: Tensor
    uncertainty: Tensor

    def exits(self, threshold: float) -> Tensor:
        """(B,) the first layer whose uncertainty is at most the threshold; `depth`: none, the full output."""
        sure = self.uncertainty <= threshold
        return torch.where(sure.any(0), sure.int().argmax(0), len(sure))

    def at(self, exits: Tensor) -> Tensor:
        """(B, C, H, W) the outputs at the given exits."""
        return torch.cat([self.outputs, self.full[None]])[exits, torch.arange(len(exits))]

    def losses(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The training losses for a target like `full`: of the network, of the probes, of the heads; and the true
        uncertainty (depth, B), the mean of `tanh |output - target|`, a label that nothing learns through.
        """
        error = self.outputs - target
        truth = error.detach().abs().tanh().flatten(2).mean(2)
        weighted = (1 - truth) * error.square().flatten(2).mean(2)
        return (
            F.mse_loss(self.full, target), (self.uncertainty - truth).square().sum(), weighted.mean(1).sum(), truth
        )  # fmt: skip


PROBES: dict[str, Callable[[int, int], str]] = {  # kind -> key of the probe of a layer at a timestep
    "attention_probe": lambda layer, t: f"{layer}",
    "mlp_probe_per_layer": lambda layer, t: f"{layer}",
    "mlp_probe_per_timestep": lambda layer, t: f"{t}",  # the paper's
    "mlp_probe_per_layer_per_timestep": lambda layer, t: f"{layer}, {t}",
}
TIMESTEPS = 1000


class _MlpProbe(nn.Module):
    """The uncertainty of tokens (B, n, C), each in 0..1, and their mean (B,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(width, 1), nn.Sigmoid())

    def forward(self, h: Tensor) -> Tensor:
        return self.classifier(h).flatten(1).mean(1)


class _AttentionProbe(nn.Module):
    """One learned query to the tokens (B, n, C) behind that of the time; (B,), of any size, as released."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.weight_kv = nn.Linear(width, 2 * width)
        self.classification = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, h: Tensor) -> Tensor:
        keys, values = self.weight_kv(h[:, None, 1:]).chunk(2, dim=-1)
        asked = F.scaled_dot_product_attention(self.q.expand(len(h), -1, -1, -1), keys, values)
        return self.classification(asked).flatten()


class EarlyExitUViT(nn.Module):
    """A U-ViT with probes of the uncertainty and an output head for each layer.

    Attributes:
        limit: how many blocks run, of a fixed table (`PartialNetwork`); None: all.
        threshold: each sample leaves at the first layer whose uncertainty is at most this; None: none does.
        autoencoder: synthesis model that decodes what it denoises; none of pixels.

    Raises:
        BackboneError: the sizes do not fit, or there are no such probes.
    """

    def __init__(self, about: UViTConfig, probe: str = "mlp_probe_per_layer") -> None:
        super().__init__()
        if about.img_size % about.patch_size or about.embed_dim % about.num_heads or about.depth % 2 == 0:
            raise BackboneError(f"a U-ViT has whole patches and heads and an odd depth, got {about}")
        if probe not in PROBES:
            raise BackboneError(f"probes are {', '.join(PROBES)}, got {probe!r}")
        self.about, self.probe, side = about, probe, about.img_size // about.patch_size
        self.limit: int | None = None
        self.threshold: float | None = None
        self.autoencoder = ""

        def head() -> _OutputHead:
            return _OutputHead(about.embed_dim, about.patch_size, about.in_chans, about.extras, side)

        self.uvit = _UViT(about)
        kind, key = _AttentionProbe if probe == "attention_probe" else _MlpProbe, PROBES[probe]
        keys = dict.fromkeys(key(layer, t) for layer in range(about.depth) for t in range(TIMESTEPS))
        self.matrix = nn.ModuleDict({name: kind(about.embed_dim) for name in keys})
        self.in_blocks_heads = nn.ModuleList(head() for _ in range(about.depth // 2))
        self.mid_block_head = head()
        self.out_blocks_heads = nn.ModuleList(head() for _ in range(about.depth // 2))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> LayerOutputs | Tensor:
        """All layers' outputs; or, with a limit or a threshold, (B, C, H, W) after leaving early.

        What has left takes no part in the layers behind, and does not depend on what has not.

        Args:
            x: (B, C, H, W); t: (B,) timesteps, of which probes of timesteps read the first.
            labels: (B,) classes, of class-conditional networks.
        """
        net, about = self.uvit, self.about
        time = net.time_embed(timestep_embedding(t / 1000 if about.normalize_timesteps else t, about.embed_dim))
        tokens = [time[:, None]]
        if about.num_classes > 0:
            if labels is None:
                raise BackboneError("this network is class-conditional: labels are needed")
            tokens.insert(0, net.label_emb(labels)[:, None])
        patches = net.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        h = torch.cat([*tokens, patches], dim=1) + net.pos_embed
        result, inside = torch.empty_like(x), torch.arange(len(x), device=x.device)
        skips, outputs, uncertainty = list[Tensor](), list[Tensor](), list[Tensor]()
        heads, half = [*self.in_blocks_heads, self.mid_block_head, *self.out_blocks_heads], len(net.in_blocks)
        for layer, block in enumerate([*net.in_blocks, net.mid_block, *net.out_blocks]):
            if layer == self.limit:
                result[inside] = heads[layer](h).to(result)
                return result
            if self.limit is None or self.threshold is not None:
                uncertainty.append(self.matrix[PROBES[self.probe](layer, int(t[0]))](h))
            if self.limit is None and self.threshold is None:
                outputs.append(heads[layer](h))
            elif self.threshold is not None and bool((sure := uncertainty[-1] <= self.threshold).any()):
                result[inside[sure]] = heads[layer](h[sure]).to(result)
                inside, h, skips = inside[~sure], h[~sure], [skip[~sure] for skip in skips]
                if not len(inside):
                    return result
            h = block(h, skips.pop()) if layer > half else block(h)
            if layer < half:
                skips.append(h)
        result[inside] = _OutputHead.forward(net, h).to(result)
        return LayerOutputs(result, torch.stack(outputs), torch.stack(uncertainty)) if outputs else result


def is_early_exit(name: str) -> bool:
    """Whether a name is a folder whose ``config.json`` says "_class_name": "EarlyExitUViT"."""
    config = Path(name) / "config.json"
    return config.is_file() and read_document(config, error=BackboneError).get("_class_name") == "EarlyExitUViT"


def load_early_exit(folder: str | os.PathLike[str]) -> EarlyExitUViT:
    """A network from a folder with ``config.json`` and one file of weights.

    The configuration says "_class_name": "EarlyExitUViT", "probe" and the sizes of `UViTConfig`, and of latents the
    "autoencoder"; weights are ``.safetensors``, or the reproduction's ``.pth``.

    Raises:
        BackboneError: a file is missing or damaged, a size is none, or the weights do not fit.
    """
    path, names = Path(folder), UViTConfig.__dataclass_fields__
    values = {"probe": "mlp_probe_per_layer", **read_document(path / "config.json", error=BackboneError)}
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pth", ".pt"))
    if len(files) != 1:
        raise BackboneError(f"{path}: expected one file of weights, found {len(files)}")
    try:
        network = EarlyExitUViT(UViTConfig(**{k: v for k, v in values.items() if k in names}), str(values["probe"]))
    except (TypeError, ValueError) as error:
        raise BackboneError(f"{path / 'config.json'}: {one_line(error)}") from None
    network.autoencoder = str(values.get("autoencoder", ""))
    try:
        network.load_state_dict(read_weights(files[0]))
    except RuntimeError as error:
        raise BackboneError(f"{files[0]}: does not fit its config.json ({one_line(error)})") from None
    check_weights(network, str(path))
    return network.eval()


def save_early_exit(network: EarlyExitUViT, folder: Path) -> None:
    """Write what `load_early_exit` reads into a folder."""
    about = {"_class_name": "EarlyExitUViT", "probe": network.probe, **vars(network.about)}
    write_document(
        folder / "config.json", about | ({"autoencoder": network.autoencoder} if network.autoencoder else {})
    )
    save_weights(folder / "model.safetensors", network.state_dict())


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """(B, width) cosines and sines of the timesteps, with periods up to 10,000."""
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t[:, None].float() * rates
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))
