"""The U-Net of DiffDIS: masks and edges of the same images side by side in one batch.

A stock diffusers U-Net with three additions: a batch-discriminative embedding (BDE) says which half of the batch
is masks and which is edges; detail-balancing interactive attention (DBIA) lets each half look at the other, in the
mid block; scale-wise conditional injection (SWCI) puts latents of the shrunk image into the skips. The names of
parameters are those of the published weights. "High-Precision Dichotomous Image Segmentation via Probing Diffusion
Capacity", ICLR 2025, arXiv 2410.10105.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones.networks import UNet2DConditionModel
from diffrep.devices import initial_weights


def branch_vectors(images: int, device: torch.device | str = "cpu") -> Tensor:
    """What BDE tells of each row of a batch: (2B, 4), [sin(label), cos(label)], B masks and then B edges.

    The label of a mask is (0, 1), of an edge (1, 0); made on the device, so that a call can be recorded.
    """
    edges = (torch.arange(2 * images, device=device) >= images).float()
    labels = torch.stack([edges, 1 - edges], dim=1)
    return torch.cat([labels.sin(), labels.cos()], dim=1)


def embed_rows(time_proj: nn.Module, time: nn.Module, branch: nn.Module, timestep: int, vectors: Tensor) -> Tensor:
    """The embedding of time and branch that the residual blocks get: (2B, C).

    Args:
        time_proj, time, branch: diffusers' `Timesteps` and two `TimestepEmbedding`, of time and of BDE.
        vectors: (2B, 4) from `branch_vectors`.
    """
    steps = torch.full((1,), timestep, device=vectors.device)
    return time(time_proj(steps).to(vectors.dtype)) + branch(vectors)


class InteractiveAttention(nn.Module):
    """DBIA: multi-head attention whose queries meet the keys and values of the other half of the batch.

    A plain module: replacing the attention processors of a U-Net leaves it as it is.

    Args:
        channels: of the tokens, and of all heads together.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, tokens: Tensor) -> Tensor:
        """(2B, N, C) -> (2B, N, C); the first half of the batch are the masks, the second the edges.

        Raises:
            ValueError: the batch has no two halves.
        """
        if len(tokens) % 2:
            raise ValueError(f"interactive attention needs as many masks as edges, got a batch of {len(tokens)}")
        other = tokens.roll(len(tokens) // 2, 0)
        q, k, v = (
            project(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, rows in ((self.to_q, tokens), (self.to_k, other), (self.to_v, other))
        )
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class InteractiveBlock(nn.Module):
    """A transformer block that attends to its own tokens, to the other branch and to the prompt, in this order.

    Args:
        block: a stock `BasicTransformerBlock` with plain layer norms; its parts are taken over.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        channels = int(block.norm1.normalized_shape[0])
        self.norm1, self.attn1 = block.norm1, block.attn1
        self.norm2_ = nn.LayerNorm(channels, eps=block.norm1.eps)
        self.attn3 = InteractiveAttention(channels, block.attn1.heads)
        self.norm2, self.attn2 = block.norm2, block.attn2
        self.norm3, self.ff = block.norm3, block.ff

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **unused: object) -> Tensor:
        """(2B, N, C) tokens, (2B, T, C') prompt -> (2B, N, C). Named as diffusers calls it."""
        tokens = hidden_states + self.attn1(self.norm1(hidden_states))
        tokens = tokens + self.attn3(self.norm2_(tokens))
        tokens = tokens + self.attn2(self.norm2(tokens), encoder_hidden_states=encoder_hidden_states)
        return tokens + self.ff(self.norm3(tokens))


def interact(mid_block: Any) -> None:
    """Give every transformer block of a U-Net's mid block DBIA, in place."""
    for attention in mid_block.attentions:
        attention.transformer_blocks = nn.ModuleList(InteractiveBlock(b) for b in attention.transformer_blocks)


def injection_parts(widths: Sequence[int], latent_channels: int) -> dict[str, nn.ModuleList]:
    """The convolutions of SWCI for skips of `widths` channels, one of each per level, under the published names.

    Returns:
        ``rgb_conv`` turns a latent (B, c, h, w) of the image into a condition (B, C, h, w), ``rgb_proj`` and
        ``rgb_proj1`` the condition into scale and shift of the skip.
    """
    return {
        "rgb_conv": nn.ModuleList(
            nn.Sequential(nn.Conv2d(latent_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU())
            for width in widths
        ),
        "rgb_proj": nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths),
        "rgb_proj1": nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths),
    }


def inject(skip: Tensor, latents: Tensor, conv: nn.Module, scale: nn.Module, shift: nn.Module) -> Tensor:
    """SWCI: modulate one skip by the image's latent of its height and width, skip * (scale + 1) + shift.

    Args:
        skip: (2B, C, h, w).
        latents: (B, c, h, w), used for both branches, or (2B, c, h, w).
        conv, scale, shift: one level's ``rgb_conv``, ``rgb_proj`` and ``rgb_proj1``.
    """
    if conv.training:  # the running variance of a batch norm counts its samples: give it as many as published
        latents = latents.repeat(len(skip) // len(latents), 1, 1, 1)
    condition = conv(latents)
    times = len(skip) // len(condition)
    factors, offsets = (projection(condition).repeat(times, 1, 1, 1) for projection in (scale, shift))
    return skip * factors + offsets + skip


class DiffDisUNet(UNet2DConditionModel):
    """The U-Net of DiffDIS, built from the config of a stock `UNet2DConditionModel`.

    Args:
        config: of a stock U-Net; `in_channels` and the class embedding are set here, keys that a stock U-Net does
            not know are left out.
    """

    rgb_conv: Any  # nn.ModuleList, of a level each, and so are the projections
    rgb_proj: Any
    rgb_proj1: Any
    class_embedding: Any

    def __init__(self, config: Mapping[str, Any]) -> None:
        out = int(config.get("out_channels", 4))
        stock = {key: value for key, value in config.items() if key in {*self.READ, *self.FIXED}}
        branches = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 4}
        if stock.get("mid_block_type", "UNetMidBlock2DCrossAttn") != "UNetMidBlock2DCrossAttn":
            raise ValueError("a DiffDIS U-Net needs a mid block with attention, this config has none")
        if not self.fits(stock):
            raise ValueError("the config is not that of a Stable Diffusion U-Net, which a DiffDIS begins as")
        super().__init__({**stock, **branches, "in_channels": 2 * out})
        interact(self.mid_block)
        for name, modules in injection_parts(injected_widths(config), out).items():
            self.add_module(name, modules)

    @property
    def levels(self) -> int:
        """How many skips SWCI changes: one per down block that halves the resolution."""
        return len(self.rgb_conv)

    def forward(  # type: ignore[override]  # it takes the image at many sizes, and noise
        self, latents: Sequence[Tensor], noise: Tensor, context: Tensor, *, timestep: int = 999, edges: bool = True
    ) -> Tensor:
        """One pass over B images: what the U-Net predicts for their masks and their edges.

        Args:
            latents: (B, c, h, w) of the images, then of the images at 1/2, 1/4, ... of their size, scaled;
                1 + `levels` of them.
            noise: (2B, c, h, w), of the masks and then of the edges; or (B, c, h, w), the same for both.
            context: (1, T, C), the embedding of the prompt.
            edges: False leaves the edges out behind the mid block, the only place where they meet the masks:
                the masks stay the same and half of the decoder is not computed.

        Returns:
            (2B, c, h, w), masks and then edges, or (B, c, h, w) masks only.

        Raises:
            ValueError: latents are missing, or their sides do not halve from one to the next.
        """
        self._check(latents)
        images = len(latents[0])
        if len(noise) == images:
            noise = noise.repeat(2, 1, 1, 1)
        vectors = branch_vectors(images, noise.device).to(noise)
        embedding = embed_rows(self.time_proj, self.time_embedding, self.class_embedding, timestep, vectors)
        rows = context.expand(2 * images, -1, -1)

        def run(block: Any, **skipped: Any) -> Any:
            prompt = {"encoder_hidden_states": rows} if getattr(block, "has_cross_attention", False) else {}
            return block(hidden_states=hidden, temb=embedding, **prompt, **skipped)

        hidden = self.conv_in(torch.cat([latents[0].repeat(2, 1, 1, 1), noise], dim=1))
        skips = [hidden]
        for number, block in enumerate(self.down_blocks):
            hidden, residuals = run(block)
            skips += residuals
            if number < self.levels:  # the skip alone is changed, not what goes on to the next block
                level = self.rgb_conv[number], self.rgb_proj[number], self.rgb_proj1[number]
                skips[-1] = inject(skips[-1], latents[number + 1], *level)
        hidden = run(self.mid_block)
        if not edges:
            hidden, embedding, rows = hidden[:images], embedding[:images], rows[:images]
            skips = [skip[:images] for skip in skips]
        up: Any
        for up in self.up_blocks:
            count = len(up.resnets)
            skips, residuals = skips[:-count], tuple(skips[-count:])
            hidden = run(up, res_hidden_states_tuple=residuals)
        return self.conv_out(self.conv_act(self.conv_norm_out(hidden)))

    def _check(self, latents: Sequence[Tensor]) -> None:
        levels, (height, width) = self.levels, latents[0].shape[-2:]
        if len(latents) < levels + 1:
            raise ValueError(f"a DiffDIS U-Net of {levels} levels needs {levels + 1} latents, got {len(latents)}")
        for level in range(levels + 1):
            size, expected = tuple(latents[level].shape[-2:]), (height // 2**level, width // 2**level)
            if height % 2**levels or width % 2**levels or size != expected:
                raise ValueError(
                    f"latent {level} is {size}, expected {expected}; the sides of the first must be multiples of"
                    f" {2**levels}, they are {(height, width)}"
                )


def injected_widths(config: Mapping[str, Any]) -> list[int]:
    """Channels of the skips that SWCI changes: of every down block but the last, which halves nothing."""
    return list(config["block_out_channels"][:-1])


def derived_weights(base: Mapping[str, Tensor], widths: Sequence[int]) -> dict[str, Tensor]:
    """The weights of a DiffDIS U-Net that follow from its base and are not simply the base's.

    Args:
        base: state dict of a U-Net that takes latents alone.
        widths: from `injected_widths`.

    Returns:
        ``conv_in`` tiled over image and noise and halved; ``attn3`` and ``norm2_`` as ``attn1`` and ``norm1``
        of the same block; zeros for both projections of SWCI, which so begins as the identity.
    """
    weight = base["conv_in.weight"]
    derived = {"conv_in.weight": weight.repeat(1, 2, 1, 1) / 2, "conv_in.bias": base["conv_in.bias"].clone()}
    for key, value in base.items():
        if key.startswith("mid_block.attentions.") and ".transformer_blocks." in key:
            for old, new in ((".attn1.", ".attn3."), (".norm1.", ".norm2_.")):
                if old in key:
                    derived[key.replace(old, new)] = value.clone()
    for level, width in enumerate(widths):
        for name in (f"rgb_proj.{level}", f"rgb_proj1.{level}"):
            derived[f"{name}.weight"] = weight.new_zeros(width, width, 3, 3)
            derived[f"{name}.bias"] = weight.new_zeros(width)
    return derived


def from_base(unet: Any, *, seed: int = 0) -> DiffDisUNet:
    """A DiffDIS U-Net that starts from the weights of a stock U-Net.

    Args:
        unet: takes latents alone; it is left as it is.
        seed: of what has no counterpart in the base: the class embedding and the first convolutions of SWCI.

    Raises:
        ValueError: the base already takes more than latents, or has a class embedding.
    """
    config = dict(unet.config)
    if config["in_channels"] != config["out_channels"] or config.get("class_embed_type") is not None:
        raise ValueError(
            f"the base must take latents alone, this one has {config['in_channels']} input and"
            f" {config['out_channels']} output channels and class embedding {config.get('class_embed_type')}"
        )
    with initial_weights(seed):
        network = DiffDisUNet(config)
    base = unet.state_dict()
    network.load_state_dict({**network.state_dict(), **base, **derived_weights(base, injected_widths(config))})
    return network


def is_diffdis(keys: Collection[str]) -> bool:
    """Whether these are the weights of a DiffDIS U-Net; their config does not tell."""
    needed = ("rgb_proj.0.weight", "class_embedding.linear_1.weight", "conv_in.weight")
    return all(key in keys for key in needed) and any(".attn3.to_q.weight" in key for key in keys)
