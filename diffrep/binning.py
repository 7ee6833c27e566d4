"""Log-binned descriptors: each cell joined with its neighbourhood at growing scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_bin(feature_map: Tensor, *, hierarchy: int = 2) -> Tensor:
    """Join each cell with the averages of its neighbours at `hierarchy` scales (Amir et al., ViT descriptors).

    Scale k looks at the eight positions 3^k cells away, each averaged over 3^k by 3^k cells; positions beyond
    the border take the nearest cell inside.

    Args:
        feature_map: (B, C, h, w).

    Returns:
        (B, (1 + 8 * hierarchy) * C, h, w).
    """
    height, width = feature_map.shape[-2:]
    bins = []
    for scale in range(hierarchy):
        step = 3**scale
        pooled = F.avg_pool2d(feature_map, step, stride=1, padding=step // 2, count_include_pad=False)
        rows, columns = torch.arange(height), torch.arange(width)
        for down in (-step, 0, step):
            for right in (-step, 0, step):
                if down == right == 0 and scale > 0:
                    continue
                bins.append(
                    pooled[..., (rows + down).clamp(0, height - 1), :][..., (columns + right).clamp(0, width - 1)]
                )
    return torch.cat(bins, dim=1)
