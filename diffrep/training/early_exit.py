"""Training of early exits (DeeDiff, Tang et al. 2023): a U-ViT, its output heads and its probes of uncertainty.

On the latents of a synthesis model's autoencoder, without a condition. The losses are the paper's: that of the network,
of the probes against what the heads miss by, and of the heads, less where they are uncertain. Its authors published no
code, and those of a reproduction could not reach its trade of quality for time; `exit_table` says what it is here, and
what a fixed depth at each timestep gives.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from diffrep.backbones.early_exit import TIMESTEPS, EarlyExitUViT, LayerOutputs, UViTConfig
from diffrep.devices import initial_weights, resolve_device
from diffrep.settings import NOT_NEGATIVE, check
from diffrep.synthesis.model import EMBEDDED, load_synthesis
from diffrep.training.loop import Batch, FitSettings, fit, step_generator
from diffrep.training.patches import PatchSource, encode_patches

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True, kw_only=True)
class EarlyExitTraining:
    """A U-ViT that is left early, and its training."""

    base: str = "tiny-synthesis"  # synthesis model whose latents are denoised, and which decodes them
    # what estimates the uncertainty; per timestep is the paper's, which the reproduction could not use
    probe: Literal[
        "mlp_probe_per_layer", "attention_probe", "mlp_probe_per_timestep", "mlp_probe_per_layer_per_timestep"
    ] = "mlp_probe_per_layer"
    patch: int = 2  # latent pixels a token's side
    width: int = 128
    blocks: int = 7  # transformer blocks of the U-ViT; after each, it can be left
    heads: int = 4
    probes_weight: float = 1.0  # lambda: of the probes' loss
    layers_weight: float = 1.0  # beta: of the output heads' losses
    held_out: int = 128
    batch_size: int = 32
    fit: FitSettings = field(
        default_factory=lambda: FitSettings(steps=2000, learning_rate=1e-3, ema_decay=0.995, bf16=False, seed=10)
    )

    def __post_init__(self) -> None:
        check(
            self, patch="1..", width="1..", blocks="1..", heads="1..", held_out="1..", batch_size="1..",
            probes_weight=NOT_NEGATIVE, layers_weight=NOT_NEGATIVE,
        )  # fmt: skip


class ExitObjective(nn.Module):
    """An early-exit network with DDPM's schedule, on which it predicts the noise."""

    def __init__(self, network: EarlyExitUViT) -> None:
        super().__init__()
        self.network = network
        self.abar: Tensor
        self.register_buffer(
            "abar", (1 - torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)).cumprod(0).float()
        )

    def forward(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> LayerOutputs:
        """What every layer says of clean latents (B, c, h, w) with the noise of (B,) timesteps."""
        abar = self.abar[timesteps].view(-1, 1, 1, 1)
        outputs = self.network(abar.sqrt() * clean + (1 - abar).sqrt() * noise, timesteps)
        assert isinstance(outputs, LayerOutputs)
        return outputs


def exit_loss(
    training: EarlyExitTraining, module: ExitObjective, ema: ExitObjective, batch: Batch
) -> Mapping[str, Tensor]:
    """The paper's loss, `simple + lambda sum (u - u^)^2 + beta sum (1 - u^) |g - eps|^2` over layers; see `fit`."""
    outputs = module(batch["clean"], batch["noise"], batch["timesteps"])
    simple, probes, heads, _ = outputs.losses(batch["noise"])
    probes = probes / len(batch["noise"])
    loss = simple + training.probes_weight * probes + training.layers_weight * heads
    return {"loss": loss, "simple": simple, "probes": probes, "layers": heads}


def exit_batch(clean: Tensor, training: EarlyExitTraining, generator: torch.Generator) -> Batch:
    """Latents with noise and timesteps; one timestep for all where each has a probe."""
    rows = torch.randint(len(clean), (training.batch_size,), generator=generator)
    alike = training.probe.endswith("per_timestep")
    timesteps = torch.randint(TIMESTEPS, (1 if alike else len(rows),), generator=generator).expand(len(rows))
    noise = torch.randn(len(rows), *clean.shape[1:], generator=generator)
    return {"clean": clean[rows].float(), "noise": noise, "timesteps": timesteps}


def train_early_exit(
    training: EarlyExitTraining, patches: PatchSource, folder: Path, *, device: str | torch.device = "auto",
    progress: bool = True,
) -> tuple[EarlyExitUViT, list[tuple[str, float, float, float]]]:  # fmt: skip
    """Train a network. Called again with the same folder, it goes on where it was.

    Args:
        folder: of the encoded patches, checkpoint and log.

    Returns:
        The moving average of the weights, in eval mode, and its `exit_table` on held-out patches.

    Raises:
        ValueError: too few patches, sizes that do not fit the latents, or a folder of another run.
    """
    place = resolve_device(device)
    base = load_synthesis(training.base, device=place)
    about = UViTConfig(
        img_size=base.window, patch_size=training.patch, in_chans=base.channels, embed_dim=training.width,
        depth=training.blocks, num_heads=training.heads,
    )  # fmt: skip
    with initial_weights(training.fit.seed):
        network = EarlyExitUViT(about, training.probe)
    network.autoencoder = training.base if training.base in EMBEDDED else os.path.abspath(training.base)
    latents, _ = encode_patches(
        patches, base, None, folder / "patches.safetensors", held_out=training.held_out, seed=training.fit.seed,
        progress=progress,
    )  # fmt: skip
    cut = len(latents) - training.held_out
    average = fit(
        ExitObjective(network), partial(exit_batch, latents[:cut], training), partial(exit_loss, training),
        training.fit, folder, device=place, progress=progress,
    )  # fmt: skip
    average.requires_grad_(False)
    return average.network, exit_table(average, latents[cut:].float().to(place))


@torch.inference_mode()
def exit_table(module: ExitObjective, clean: Tensor) -> list[tuple[str, float, float, float]]:
    """What leaving early saves and costs: threshold, mean blocks run, and mean squared errors of the noise.

    The last two are the error with the threshold, and that of a fixed table: at each timestep the depth that is nearest
    to the mean of those with the threshold. Over 20 timesteps; the first row is of the whole network.

    Args:
        clean: (N, c, h, w) latents.
    """
    generator, rows = step_generator(0, 0), list[Tensor]()
    for t in range(TIMESTEPS // 40, TIMESTEPS, TIMESTEPS // 20):
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        outputs = module(clean, noise, torch.full((len(clean),), t, device=clean.device))
        layers = (torch.cat([outputs.outputs, outputs.full[None]]) - noise).square().flatten(2).mean(2)
        exits = torch.stack([outputs.exits(threshold) for threshold in (-1.0, *THRESHOLDS)])
        blocks = exits.float().mean(1)
        rows.append(torch.stack([blocks, layers.gather(0, exits).mean(1), layers.mean(1)[blocks.round().long()]]))
    names = ["whole", *(f"{threshold:g}" for threshold in THRESHOLDS)]
    return [(name, *values) for name, values in zip(names, torch.stack(rows).mean(0).T.tolist(), strict=True)]
