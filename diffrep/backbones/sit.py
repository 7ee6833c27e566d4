"""SiT as a backbone (Ma et al. 2024): a DiT that was trained on an interpolant, in a folder with its VAE.

The published checkpoints are weights alone. A folder has one such file (``SiT-XL-2-256x256.pt``, or safetensors), the
VAE in diffusers' layout (``vae/``), and ``config.json`` with the flags of SiT's own scripts: ``path_type`` and
``prediction``, which no tensor tells, and ``num_heads`` where the width is not that of a published model. Its network
is diffusers' DiT under other names, but for the frequencies of the time.

The linear path with a velocity network, which is what was published, is a rectified flow whose time runs backwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffrep.backbones.base import BackboneError
from diffrep.backbones.pipelines import ENCODER_ONLY, load_component, network_class, without_decoder
from diffrep.backbones.repositories import LoadOptions, Repository
from diffrep.backbones.transformers import DiffusionTransformer
from diffrep.backbones.weight_files import read_weights
from diffrep.files import one_line

HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}  # of the published sizes XL, L, B and S, by their width
_TIME = {"timestep_embedder.linear_1": "t_embedder.mlp.0", "timestep_embedder.linear_2": "t_embedder.mlp.2"}
_BLOCK = {
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "norm1.linear": "adaLN_modulation.1",
}
_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}


class SiT(DiffusionTransformer):
    """A frozen SiT; see the module. It is called with 1000 times the share of noise, as all flows here are."""

    def __init__(self, transformer: Any, vae: Any, *, name: str, source: str) -> None:
        super().__init__(transformer, vae, torch.ones(1000), name=name, source=source)
        self.flow = True

    def predicted(self, states: Tensor, timestep: float, conditions: Sequence[Any], **_: Any) -> Tensor:
        """See `DiffusionBackbone.predicted`: SiT gives the velocity from noise to data."""
        return -super().predicted(states, timestep, conditions)

    def _inputs(self, latents: Tensor, timestep: float, conditions: Sequence[Any], guidance: float) -> dict[str, Any]:
        return super()._inputs(latents, 1 - timestep / 1000, conditions, guidance)


def load_sit(source: Repository, options: LoadOptions) -> SiT:
    """Load a folder or hub id as the module describes it.

    Raises:
        BackboneError: a file is missing, the path or the prediction is another, or the weights are no SiT's.
    """
    config = source.json("config.json")
    path, prediction = config.get("path_type"), config.get("prediction", "velocity")
    if path != "Linear" or prediction != "velocity":
        raise BackboneError(
            f"{source.label}: is a SiT of the path {path!r} that predicts {prediction!r}; only 'Linear' and 'velocity',"
            " which are the published ones, are a rectified flow"
        )
    files = [file for file in source.files if "/" not in file and file.endswith((".pt", ".pth", ".safetensors"))]
    if len(files) != 1 or not source.has("vae"):
        raise BackboneError(
            f"{source.label}: a SiT has one file of weights and vae/, found {', '.join(files) or 'none'}"
        )
    network = transformer_of(read_weights(source.fetch(files) / files[0]), config, files[0])
    optional = () if options.decoder else ENCODER_ONLY
    vae_class = network_class("AutoencoderKL", source.json("vae/config.json"))
    vae = load_component(vae_class, source, "vae", options.dtype, optional=optional, weights=options.weights)
    return SiT(network, vae if options.decoder else without_decoder(vae), name=options.name, source=source.label)


def transformer_of(weights: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Any:
    """The network of a checkpoint, as diffusers' DiT; sizes are those of its tensors.

    Raises:
        BackboneError: tensors are missing, left over or of other shapes, or the number of heads is not known.
    """
    from diffusers import DiTTransformer2DModel

    try:
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
        heads = int(config.get("num_heads") or HEADS[width])
        side = round(weights["pos_embed"].shape[1] ** 0.5)
        network: Any = DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels,
            out_channels=len(weights["final_layer.linear.bias"]) // patch**2, num_layers=depth, patch_size=patch,
            sample_size=side * patch, num_embeds_ada_norm=len(weights["y_embedder.embedding_table.weight"]) - 1,
        )  # fmt: skip
        network.load_state_dict(_renamed(weights, depth))
        network.pos_embed.pos_embed.copy_(weights["pos_embed"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise BackboneError(f"{name}: is no SiT, or needs num_heads in config.json ({one_line(error)})") from None
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # diffusers' DiT has 1
    return network.eval()


def _renamed(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The tensors under diffusers' names; each block has an embedding of time and class of its own there."""
    left = {key: value for key, value in weights.items() if key != "pos_embed"}
    named = dict[str, Tensor]()
    embedding = {"class_embedder.embedding_table.weight": left.pop("y_embedder.embedding_table.weight")}
    for kind in ("weight", "bias"):
        named |= {f"{ours}.{kind}": left.pop(f"{theirs}.{kind}") for ours, theirs in _ENDS.items()}
        embedding |= {f"{ours}.{kind}": left.pop(f"{theirs}.{kind}") for ours, theirs in _TIME.items()}
        for i in range(depth):
            block, parts = f"transformer_blocks.{i}", left.pop(f"blocks.{i}.attn.qkv.{kind}").chunk(3)
            named |= {f"{block}.attn1.to_{part}.{kind}": value for part, value in zip("qkv", parts, strict=True)}
            named |= {
                f"{block}.{ours}.{kind}": left.pop(f"blocks.{i}.{theirs}.{kind}") for ours, theirs in _BLOCK.items()
            }
    if left:
        raise KeyError(f"nothing that takes {', '.join(sorted(left)[:3])}")
    named |= {
        f"transformer_blocks.{i}.norm1.emb.{key}": value for i in range(depth) for key, value in embedding.items()
    }
    return named
