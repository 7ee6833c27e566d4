"""diffusers' residual and transformer blocks on CUDA: channels-last, normalisation and activation in one kernel.

The sums and their order of rounding are the kernels' own (float32 throughout), so results differ from diffusers' by
rounding, and lie nearer to float32 than its bfloat16 does. Networks on another device, and calls that need gradients,
are left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

TYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 would be rounded on the way
_log = logging.getLogger(__name__)


@contextmanager
def fused_blocks(network: nn.Module) -> Iterator[None]:
    """Run a U-Net or a VAE of diffusers in the body with its blocks fused, where it lies on CUDA and Triton works.

    Its convolutions are stored channels-last from then on: the same numbers in another order.
    """
    weight = next(network.parameters())
    if not weight.is_cuda or weight.dtype not in TYPES or torch.is_grad_enabled():
        yield
        return
    patched: list[Any] = []
    with torch.cuda.device(weight.device):  # Triton launches on the current one
        try:
            if kernels_work(weight.device):
                channels_last(network)
                for module, forward in _fused(network):
                    if "forward" not in module.__dict__:  # else it is compiled, which fuses on its own
                        module.forward = forward
                        patched.append(module)
            yield
        finally:
            for module in patched:
                del module.forward  # uncovers that of the class


def channels_last(network: nn.Module) -> None:
    """Store the convolutions of a network channels-last, once."""
    convolutions = (m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1))
    first = next(convolutions, None)
    if first is not None and not first.weight.is_contiguous(memory_format=torch.channels_last):
        # what is stored in inference mode could not be part of a gradient later, as guidance takes it
        with torch.inference_mode(False), torch.no_grad():
            network.to(memory_format=torch.channels_last)


def _fused(network: nn.Module) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Each module that runs in another way, with that way."""
    for module in network.modules():
        parts: Any = module
        kind = type(module).__name__  # of diffusers or of `layers`, which names what is the same alike
        if kind == "ResnetBlock2D" and _plain_resnet(parts):
            yield module, partial(_resnet, module)
        elif kind == "Transformer2DModel" and parts.is_input_continuous and _norm(parts.norm):
            yield module, partial(_transformer, module)
        elif kind == "GEGLU":
            yield module, partial(_gated, module)
        elif _norm(getattr(module, "conv_norm_out", None)) and isinstance(getattr(module, "conv_act", None), nn.SiLU):
            yield parts.conv_norm_out, partial(_normalised, parts.conv_norm_out, silu=True)
            yield parts.conv_act, _unchanged


def _norm(module: object) -> bool:
    return isinstance(module, nn.GroupNorm) and module.affine


def _plain_resnet(block: Any) -> bool:
    """Adds the embedding of time, activates by SiLU and does not resample in between."""
    dropout = getattr(block, "dropout", None)
    still = block.upsample is None and block.downsample is None and not (block.training and dropout and dropout.p)
    return bool(
        still
        and block.time_embedding_norm in ("default", "group")  # "group", of VAE decoders, adds none
        and isinstance(block.nonlinearity, nn.SiLU)
        and _norm(block.norm1)
        and _norm(block.norm2)
    )


def _normalised(norm: Any, maps: Tensor, *, added: Tensor | None = None, silu: bool = False) -> Tensor:
    from diffrep.backbones.norm_kernels import group_norm

    return group_norm(maps, norm.num_groups, norm.weight, norm.bias, norm.eps, added=added, silu=silu)


def _unchanged(maps: Tensor) -> Tensor:
    return maps


def _resnet(block: Any, maps: Tensor, temb: Tensor | None = None, *unused: Any, **named: Any) -> Tensor:
    """As `ResnetBlock2D.forward`; the biases of its convolutions are added where the maps are read next."""
    from diffrep.backbones.norm_kernels import join

    hidden, added = _without_bias(block.conv1, _normalised(block.norm1, maps, silu=True))
    if block.time_emb_proj is not None and temb is not None and block.time_embedding_norm == "default":
        added = added + block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
    hidden, bias = _without_bias(block.conv2, _normalised(block.norm2, hidden, added=added, silu=True))
    if block.conv_shortcut is not None:
        maps, more = _without_bias(block.conv_shortcut, maps)
        bias = bias + more
    joined = join(maps, hidden, bias)
    return joined if block.output_scale_factor == 1 else joined / block.output_scale_factor


def _without_bias(conv: Any, maps: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution's output before its bias, and the bias (1, C); with a zero bias where somebody reads the output."""
    plain = type(conv) is nn.Conv2d and conv.bias is not None and conv.padding_mode == "zeros"
    if not plain or conv._forward_hooks or conv._forward_pre_hooks:
        output: Tensor = conv(maps)
        return output, output.new_zeros(1, output.shape[1])
    output = nn.functional.conv2d(maps, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return output, conv.bias[None]


def _gated(module: Any, tokens: Tensor, *unused: Any, **named: Any) -> Tensor:
    from diffrep.backbones.norm_kernels import gated_gelu

    return gated_gelu(module.proj(tokens))


def _transformer(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    *unused: Any,
    return_dict: bool = True,
    **named: Any,
) -> Any:
    """As `Transformer2DModel.forward` of continuous inputs; the tokens are views of channels-last maps."""
    height, width = hidden_states.shape[-2:]
    tokens = _normalised(module.norm, hidden_states)
    tokens = tokens if module.use_linear_projection else module.proj_in(tokens)
    tokens = tokens.permute(0, 2, 3, 1).flatten(1, 2)
    tokens = module.proj_in(tokens) if module.use_linear_projection else tokens
    passed = {name: value for name, value in named.items() if name in ("cross_attention_kwargs", "class_labels")}
    for block in module.transformer_blocks:
        tokens = block(tokens, encoder_hidden_states=encoder_hidden_states, **passed)
    tokens = module.proj_out(tokens) if module.use_linear_projection else tokens
    maps = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    maps = maps if module.use_linear_projection else module.proj_out(maps)
    output = maps + hidden_states
    if not return_dict:
        return (output,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=output)


@lru_cache(maxsize=8)
def kernels_work(device: torch.device) -> bool:
    """Whether Triton can build and run the kernels on a CUDA device: it needs a C compiler, and a card it knows."""
    try:
        from diffrep.backbones.norm_kernels import group_norm

        x = torch.linspace(-1, 1, 2 * 64 * 6, device=device).view(2, 64, 3, 2)
        ones = torch.ones(64, device=device)
        expected = nn.functional.silu(nn.functional.group_norm(x, 32, ones, ones, 1e-5))
        close = torch.allclose(group_norm(x, 32, ones, ones, 1e-5, silu=True), expected, atol=1e-4)
    except Exception as error:  # whatever is missing, PyTorch's own kernels do the work
        _log.info("Triton's kernels cannot be used on %s: %s", device, error)
        return False
    return close
