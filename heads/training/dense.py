"""Turning the U-Net of a diffusion model into a one-step predictor of depth or normals, as a `Family` says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.alignment import fit_scale_shift
from diffrep.devices import initial_weights
from diffrep.heads.decoder import DetailDecoder
from diffrep.heads.dense import DenseHead
from diffrep.heads.families import Family, Task, task_vector
from diffrep.heads.one_step import OneStep, Schedule
from diffrep.training.loop import Batch


def widen_conv_in(conv: nn.Conv2d, *, scale_bias: bool = False) -> nn.Conv2d:
    """A convolution for twice the channels that gives the same for an input repeated twice.

    Args:
        scale_bias: halve the bias too, as E2E-FT does (which then does not give the same).
    """
    like: Any = conv
    wide = nn.Conv2d(2 * conv.in_channels, conv.out_channels, like.kernel_size, padding=like.padding).to(conv.weight)
    bias = like.bias / 2 if scale_bias else like.bias
    wide.load_state_dict({"weight": conv.weight.repeat(1, 2, 1, 1) / 2, "bias": bias})
    return wide


def adapt_unet(unet: Any, recipe: Family, *, seed: int = 0) -> Any:
    """Give a U-Net the inputs of a recipe, in place: a wider first convolution, an embedding of the task vector.

    A U-Net that has them already (to train on, or E2E-FT from Marigold) stays as it is.

    Args:
        seed: of the embedding's random weights.

    Raises:
        ValueError: the U-Net's channels fit neither.
    """
    from diffusers.models.embeddings import TimestepEmbedding

    channels = unet.config.out_channels
    wanted = channels if recipe.first_latent == "none" else 2 * channels
    if unet.config.in_channels == channels and wanted == 2 * channels:
        unet.conv_in = widen_conv_in(unet.conv_in, scale_bias=recipe.scale_bias)
        unet.register_to_config(in_channels=wanted)
    if unet.config.in_channels != wanted:
        raise ValueError(
            f"this recipe needs a U-Net of {wanted} input channels or of {channels}, not of {unet.config.in_channels}"
        )
    if recipe.task_vector is not None and unet.config.class_embed_type is None:
        with initial_weights(seed):
            embedding = TimestepEmbedding(4, unet.time_embedding.linear_1.out_features)
        unet.class_embedding = embedding.to(unet.conv_in.weight)
        unet.register_to_config(class_embed_type="projection", projection_class_embeddings_input_dim=4)
    return unet


class OneStepModel(nn.Module):
    """A U-Net in training, with its conditioning: the empty prompt, the timestep, the task.

    Args:
        unet: adapted by `adapt_unet`.
        context: (1, tokens, C), the encoded empty prompt.
        alphas_cumprod: (T,) of the schedule.
        decoder: draws the annotations where the VAE's decoder does not.
    """

    context: Tensor
    alphas_cumprod: Tensor

    def __init__(
        self, unet: Any, context: Tensor, alphas_cumprod: Tensor, recipe: Family, decoder: DetailDecoder | None = None
    ) -> None:
        super().__init__()
        self.unet, self.recipe, self.decoder = unet, recipe, decoder
        self.register_buffer("context", context.detach().clone())
        self.register_buffer("alphas_cumprod", alphas_cumprod.detach().clone())

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.alphas_cumprod, self.recipe.predicts)

    def forward(
        self, inputs: Tensor, timesteps: Tensor, tasks: Tensor | None = None, pixels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The raw output (B, c, h, w) for `inputs` (B, c or 2c, h, w), timesteps (B,) and task vectors (B, 4).

        With the images' pixels (B, 3, H, W) in [0, 1] also what the decoder draws of what the output means.
        """
        context = self.context.expand(len(inputs), -1, -1)
        output: Tensor = self.unet(inputs, timesteps, encoder_hidden_states=context, class_labels=tasks).sample
        if pixels is None:
            return output
        assert self.decoder is not None
        noisy = inputs[:, output.shape[1] :] if inputs.shape[1] > output.shape[1] else None
        return output, self.decoder(self.clean(output, noisy, timesteps), pixels)

    def noisy(self, targets: Tensor, noise: Tensor | None, timesteps: Tensor) -> Tensor | None:
        """What stands beside the image: the noised target, zeros, or nothing."""
        if self.recipe.first_latent != "noise":
            return None if self.recipe.first_latent == "none" else torch.zeros_like(targets)
        assert noise is not None
        return self.schedule.add_noise(targets, noise, timesteps)

    def inputs(self, images: Tensor, noisy: Tensor | None) -> Tensor:
        """The input of the U-Net: image latents, then the noisy ones."""
        return images if noisy is None else torch.cat([images, noisy], 1)

    def clean(self, output: Tensor, noisy: Tensor | None, timesteps: Tensor) -> Tensor:
        """The clean latent that an output means, float32."""
        output = output.float()
        return self.schedule.clean(output, torch.zeros_like(output) if noisy is None else noisy, timesteps)

    def target(self, targets: Tensor, noise: Tensor | None, timesteps: Tensor) -> Tensor:
        """What the output is compared with by the latent loss; from zeros, v is minus the target over the spread."""
        return self.schedule.target(targets, torch.zeros_like(targets) if noise is None else noise, timesteps)


def dense_head_of(model: OneStepModel, vae: Any, task: Task) -> DenseHead:
    """The head that a model in training is; they share their weights."""
    family = replace(model.recipe, result="sample" if model.recipe.timesteps == "all" else "clean")
    parts = (model.unet, vae, model.context, model.schedule, family)
    return DenseHead(OneStep(*parts, fold=False, decoder=model.decoder), task)


@torch.no_grad()
def predict_maps(
    model: OneStepModel, vae: Any, pixels: Tensor, task: Task, *, steps: int = 1, seed: int = 0, batch_size: int = 16
) -> Tensor:
    """Maps of images, decoded.

    Args:
        pixels: (B, 3, H, W) in [-1, 1], sides that are multiples of the VAE's stride.
        steps: of DDIM, for recipes that are trained on all timesteps.
        seed: of the noise that recipes with noise start from, the same for all images.

    Returns:
        (B, 1, H, W) in [0, 1] for depth and disparity; (B, 3, H, W) normals in LUB as they are decoded, short where
        there is no surface.

    Raises:
        ValueError: several steps of a recipe that is trained on one timestep.
    """
    head = dense_head_of(model, vae, task)
    machine, recipe = head.model, model.recipe
    latents = machine.encode(pixels / 2 + 0.5, batch_size=batch_size)
    size = (int(latents.shape[-2]), int(latents.shape[-1]))
    noise = machine.draw(size, seed, 0).to(latents) if recipe.first_latent == "noise" else None
    timestep = recipe.timestep if steps == 1 else None
    annotations = machine.predict(latents, noise, steps=steps, timestep=timestep, batch_size=batch_size)
    return head.read(machine.draw_maps(annotations, pixels / 2 + 0.5, batch_size=batch_size), unit=False)


def draw_rows(batch: int, recipe: Family, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Timesteps, task vectors and noise of the rows of a batch: first all images to annotate, then those to rebuild.

    Args:
        shape: (c, h, w) of a latent.
    """
    rows = batch + math.ceil(recipe.preserve * batch)
    drawn = {"timesteps": torch.full((rows,), recipe.timestep)}
    if recipe.timesteps == "all":
        drawn["timesteps"] = torch.randint(1000, (rows,), generator=generator)
    if recipe.task_vector is not None:
        annotate, rebuild = torch.tensor(recipe.task_vector), torch.tensor(task_vector((0, 1)))
        drawn["tasks"] = torch.cat([annotate.expand(batch, 4), rebuild.expand(rows - batch, 4)])
    noises = ["noise"] if recipe.first_latent == "noise" else []
    noises += ["image_noise", "target_noise"] if recipe.posterior == "sample" else []
    return drawn | {name: torch.randn(rows, *shape, generator=generator) for name in noises}


@torch.no_grad()
def encode_rows(vae: Any, pixels: Tensor, annotation: Tensor, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Latents of the rows of a batch.

    Args:
        pixels: (B, 3, H, W) in [-1, 1]; annotation: (B, 1 or 3, H, W) in [-1, 1].
        drawn: by `draw_rows`.

    Returns:
        "images" and "targets", (rows, c, h, w): the first B rows annotate, the others rebuild the first images.
    """
    batch, rows = len(pixels), len(drawn["timesteps"])
    repeated = torch.cat([torch.arange(batch), torch.arange(rows - batch)])
    image = vae.encode(pixels).latent_dist
    target = vae.encode(annotation.expand(-1, 3, -1, -1)).latent_dist
    means = {"images": image.mean[repeated], "targets": torch.cat([target.mean, image.mean[: rows - batch]])}
    if "image_noise" in drawn:
        means["images"] = means["images"] + image.std[repeated] * drawn["image_noise"]
        spread = torch.cat([target.std, image.std[: rows - batch]])
        means["targets"] = means["targets"] + spread * drawn["target_noise"]
    return {name: vae.config.scaling_factor * mean.float() for name, mean in means.items()}


def _asked(module: nn.Module, ema: OneStepModel, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The output for a batch, and what stood beside the images."""
    noisy = ema.noisy(batch["targets"], batch.get("noise"), batch["timesteps"])
    return module(ema.inputs(batch["images"], noisy), batch["timesteps"], batch.get("tasks")), noisy


def latent_losses(module: nn.Module, ema: OneStepModel, batch: Batch) -> dict[str, Tensor]:
    """Lotus' loss: annotation plus reconstruction, each the mean squared error of what the output means.

    Args:
        module: a `OneStepModel`, possibly wrapped; ema: its average, for its settings.
        batch: "images", "targets" (rows, c, h, w), "timesteps" (rows,), where the recipe has them "tasks" (rows, 4)
            and "noise" (rows, c, h, w); "mask" (B, 1, h, w) bool, cells of the first B rows that count.
    """
    output, _ = _asked(module, ema, batch)
    target, count = ema.target(batch["targets"], batch.get("noise"), batch["timesteps"]), len(batch["mask"])
    annotation = latent_loss(output[:count], target[:count], batch["mask"])
    if len(output) == count:
        return {"loss": annotation, "annotation": annotation}
    reconstruction = latent_loss(output[count:], target[count:])
    return {"loss": annotation + reconstruction, "annotation": annotation, "reconstruction": reconstruction}


def decoded_losses(vae: Any, task: Task) -> Callable[[nn.Module, OneStepModel, Batch], dict[str, Tensor]]:
    """E2E-FT's loss, behind the frozen decoder.

    The batch has "images", "targets" (for their shape alone), "timesteps", and "reference" (B, 1 or 3, H, W): metric
    depth or unit normals, with "valid" (B, 1, H, W) bool.
    """

    def losses(module: nn.Module, ema: OneStepModel, batch: Batch) -> dict[str, Tensor]:
        latents = ema.clean(*_asked(module, ema, batch), batch["timesteps"])
        decoded = vae.decode(latents / vae.config.scaling_factor).sample.float()
        if task == "normals":
            return {"loss": angular_loss(decoded_normals(decoded), batch["reference"], batch["valid"])}
        return {"loss": affine_invariant_loss(decoded_depth(decoded), batch["reference"], batch["valid"])}

    return losses


def latent_mask(valid: Tensor, stride: int = 8) -> Tensor:
    """Cells of which every pixel is valid: (B, 1, H, W) bool -> (B, 1, H / stride, W / stride) bool."""
    return F.max_pool2d((~valid).float(), stride, stride) == 0


def latent_loss(predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error in float32 of (B, c, h, w) over the cells of a mask (B, 1, h, w), or all; 0 if it has none."""
    squares = (predicted.float() - target.float()).square()
    if mask is None:
        return squares.mean()
    keep = mask.expand_as(squares)
    return torch.where(keep, squares, 0.0).sum() / keep.sum().clamp(min=1)


def decoded_depth(decoded: Tensor) -> Tensor:
    """(B, 3, H, W) as the VAE decodes it -> (B, 1, H, W) in [-1, 1]: the channels' mean, clamped."""
    return decoded.mean(1, keepdim=True).clamp(-1, 1)


def decoded_normals(decoded: Tensor) -> Tensor:
    """(B, 3, H, W) as the VAE decodes it -> nearly unit normals (E2E-FT divides by the length + 1e-5, and clamps)."""
    return (decoded / (torch.linalg.vector_norm(decoded, dim=1, keepdim=True) + 1e-5)).clamp(-1, 1)


def affine_invariant_loss(estimate: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """E2E-FT's depth loss: mean over all masked pixels of the batch of |s p + t - d|, all (B, 1, H, W).

    Scale and shift are fitted per image by least squares, and gradients flow through the fit.
    """
    scale, shift = fit_scale_shift(estimate, reference, mask, undetermined="zero")
    aligned = scale.view(-1, 1, 1, 1) * estimate + shift.view(-1, 1, 1, 1)
    return (aligned - reference)[mask].abs().mean()


def angular_loss(estimate: Tensor, reference: Tensor, mask: Tensor, *, margin: float = 1e-4) -> Tensor:
    """E2E-FT's normal loss: mean angle over the masked pixels, radians.

    Args:
        estimate, reference: (B, 3, H, W) unit normals; mask: (B, 1, H, W) bool.
        margin: cosines are kept this far from 1 and -1, where the gradient is infinite; 0 is the published form,
            which gives NaN gradients where the estimate is exact.
    """
    cosine = (estimate * reference).sum(1, keepdim=True)[mask]
    return torch.acos(cosine.clamp(-1 + margin, 1 - margin)).mean()
