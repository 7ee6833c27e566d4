"""The condition: self-supervised embeddings, one cross-attention token each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffrep.backbones import BackboneError
from diffrep.files import read_document, read_weights, save_weights, write_document

OFFICIAL_TOKENS = ("patch_fc", "region_fc")  # the authors' names of the projections, in the order of the tokens


class ConditionEmbedder(nn.Module):
    """Token k of the context = Linear_k(e_k / ||e_k||), trained together with the U-Net.

    The null condition is the embedding of all zeros, so that its token is the bias (official code).

    Args:
        dims: width of the embedding of each token: (384,) for one patch embedding, (384, 768) where a second token
            tells of a larger region.
        width: of the tokens, the U-Net's ``cross_attention_dim``.
        normalize: divide embeddings by their length first.
    """

    def __init__(self, dims: Sequence[int], width: int, *, normalize: bool = True) -> None:
        super().__init__()
        self.dims, self.width, self.normalize = tuple(int(d) for d in dims), int(width), normalize
        self.tokens = nn.ModuleList(nn.Linear(dim, self.width) for dim in self.dims)

    def forward(self, *embeddings: Tensor) -> Tensor:
        """Embeddings, (B, dim) for each token -> context (B, tokens, width).

        Trailing tokens that are left out get their null, as the large-image code of the authors does with the
        embedding of the region.

        Raises:
            ValueError: an embedding has another width, or there are more than tokens.
        """
        if not 1 <= len(embeddings) <= len(self.dims):
            raise ValueError(f"this model takes 1 to {len(self.dims)} embeddings an image, got {len(embeddings)}")
        first = embeddings[0]
        rest = [first.new_zeros(len(first), dim) for dim in self.dims[len(embeddings) :]]
        found = []
        for number, (embedding, project) in enumerate(zip([*embeddings, *rest], self.tokens, strict=True)):
            if embedding.ndim != 2 or embedding.shape[1] != self.dims[number]:
                raise ValueError(
                    f"embedding {number} of this model is {self.dims[number]} wide: give (B, {self.dims[number]}),"
                    f" got {tuple(embedding.shape)}"
                )
            found.append(project(F.normalize(embedding, dim=1) if self.normalize else embedding))
        return torch.stack(found, dim=1)

    def null(self, batch: int = 1) -> Tensor:
        """Context (batch, tokens, width) of the null condition."""
        biases: list[Any] = [linear.bias for linear in self.tokens]
        return torch.stack(biases).expand(batch, -1, -1)

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"dims": list(self.dims), "width": self.width, "normalize": self.normalize}
        write_document(folder / "config.json", config)
        save_weights(folder / "model.safetensors", self.state_dict())

    @classmethod
    def load(cls, folder: Path) -> ConditionEmbedder:
        """Read what `save` wrote, or a record of the authors' classes (patch_embed_dim, ..., target_dim).

        Raises:
            BackboneError: a file is missing or does not fit.
        """
        config = read_document(folder / "config.json", error=BackboneError)
        weights, _ = read_weights(folder / "model.safetensors", error=BackboneError)
        official = "target_dim" in config
        if not official and (missing := sorted({"dims", "width"} - set(config))):
            raise BackboneError(f"{folder / 'config.json'}: {', '.join(missing)} missing")
        try:
            if official:
                dims = [config[k] for k in ("patch_embed_dim", "region_embed_dim") if config.get(k)]
                embedder = cls(dims, config["target_dim"], normalize=config.get("normalize_ssl", True))
                weights = official_tokens(weights)
            else:
                embedder = cls(config["dims"], config["width"], normalize=config.get("normalize", True))
            embedder.load_state_dict({k: v.float() for k, v in weights.items()})
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise BackboneError(f"{folder}: the weights do not fit ({' '.join(str(error).split())[:200]})") from None
        return embedder


def official_tokens(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' projections: patch_fc -> tokens.0, region_fc -> tokens.1."""
    renamed = {}
    for key, value in weights.items():
        name, _, kind = key.partition(".")
        renamed[f"tokens.{OFFICIAL_TOKENS.index(name)}.{kind}" if name in OFFICIAL_TOKENS else key] = value
    return renamed
