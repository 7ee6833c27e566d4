"""Models in one file, and LoRA files on top of models: ``.safetensors``, ``.ckpt``, ``.pt``, ``.pth``.

Stable Diffusion 1.x, 2.x and XL in the layout of the original programs is weights alone. Configurations come from
``single_files.json``, which has those of the public models, with widths and depths as the tensors' shapes say;
diffusers' `from_single_file` renames the tensors. Nothing is fetched.

LoRA files are merged into a model's weights: diffusers knows the forms in which they are published (its own, PEFT's,
kohya's) and peft the layers; what is merged costs nothing when features are computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from diffrep.backbones.base import Backbone, BackboneError
from diffrep.backbones.diffusion import LatentBackbone
from diffrep.backbones.latent_diffusion import LatentDiffusion
from diffrep.backbones.pipelines import ENCODER_ONLY, alphas_cumprod, refuse_channels, without_decoder
from diffrep.backbones.pixel_diffusion import adm_backbone
from diffrep.backbones.repositories import LoadOptions
from diffrep.backbones.text import PROJECTION, ClipEncoders
from diffrep.backbones.vit_loading import is_vit, vit_from_weights, vit_weights
from diffrep.backbones.weight_files import describe_weights, read_weights
from diffrep.files import number_of, one_line

CONFIGURATIONS = Path(__file__).with_name("single_files.json")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
HEAD_WIDTH = 64  # channels of an attention head, in U-Nets since Stable Diffusion 2 and in all their text encoders
TOKENS = 77
_CLASSES = {"text_encoder": "CLIPTextModel", "text_encoder_2": PROJECTION}
START, END = 49406, 49407  # in CLIP's vocabulary

Shapes = Mapping[str, Sequence[int]]


def load_single_file(path: Path, options: LoadOptions) -> Backbone:
    """The backbone in one file: Stable Diffusion, guided-diffusion (ADM), or a ViT of DINO or timm.

    Raises:
        BackboneError: the file is damaged, or something else; the message says what, and what to give instead.
    """
    weights = read_weights(path)
    if "input_blocks.0.0.weight" in weights and not any(".transformer_blocks." in key for key in weights):
        return adm_backbone(weights, options.adm, name=options.name, source=str(path))
    if is_vit(vit := vit_weights(weights)):
        return vit_from_weights(path, vit, options)
    what, instead = describe_weights(weights)
    if what:
        raise BackboneError(f"{path}: is {what}; {instead}")
    if f"{UNET}input_blocks.0.0.weight" not in weights:
        near = ", ".join(sorted(weights)[:3])
        raise BackboneError(
            f"{path}: is no checkpoint of Stable Diffusion or guided-diffusion: it holds"
            f" {number_of(len(weights), 'tensor')} ({near}, ...), of no known model"
        )
    if not any(key.startswith(f"{VAE}encoder.") for key in weights):
        raise BackboneError(f"{path}: holds a U-Net but no VAE ({VAE}encoder...); give the whole checkpoint")
    return _stable_diffusion(path, weights, options)


def _stable_diffusion(path: Path, weights: dict[str, Tensor], options: LoadOptions) -> LatentDiffusion:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    family = _family(path, shapes)
    config = json.loads(CONFIGURATIONS.read_text())[family]
    refuse_channels(str(path), shapes[f"{UNET}input_blocks.0.0.weight"][1], int(config["vae"]["latent_channels"]))
    if family == "sd2" and "512" in path.name:  # the base model, of which the weights say nothing
        config["unet"]["sample_size"], config["scheduler"]["prediction_type"] = 64, "epsilon"
    config["unet"] |= _unet_sizes(shapes, config["unet"])
    config["vae"] |= _vae_sizes(shapes)
    texts = {part: values for part, values in config.items() if part.startswith("text_encoder")}
    parts = {key: value for key, value in weights.items() if key.startswith(("cond_stage_model.", "conditioner."))}
    text = SingleFileText(path, parts, texts, device=options.device, dtype=options.dtype)
    unet = _from_file(UNet2DConditionModel, "unet", weights, config["unet"], path)
    vae = _from_file(AutoencoderKL, "vae", weights, config["vae"], path)
    vae = vae if options.decoder else without_decoder(vae)
    backbone = LatentDiffusion(
        unet,
        vae,
        alphas_cumprod(config["scheduler"]),
        text=text if parts else None,
        predicts=config["scheduler"].get("prediction_type", "epsilon"),
        name=options.name,
        source=str(path),
    )
    backbone.scheduler = config["scheduler"]
    return backbone


def _from_file(kind: Any, part: str, weights: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> Any:
    """A network with a configuration and weights of the original names; diffusers reads the one from a folder only."""
    with TemporaryDirectory() as folder:
        (Path(folder) / part).mkdir()
        (Path(folder) / part / "config.json").write_text(json.dumps({**config, "_class_name": kind.__name__}))
        try:
            module = kind.from_single_file(dict(weights), config=folder, subfolder=part, local_files_only=True)
        except Exception as error:  # tensors that are missing or of another shape: several kinds
            raise BackboneError(f"{path}: its {part} does not fit a Stable Diffusion ({one_line(error)})") from None
    for name, parameter in module.named_parameters():
        if parameter.device.type == "meta" and not name.startswith(ENCODER_ONLY):
            raise BackboneError(f"{path}: its {part} lacks {name}")
    return module


def _family(path: Path, shapes: Shapes) -> str:
    """Which of the public models a checkpoint is built as: by what its U-Net attends to."""
    width = _context_width(shapes)
    if width is None:
        raise BackboneError(f"{path}: its U-Net has no cross-attention, it is no Stable Diffusion")
    if any(key.startswith(f"{UNET}label_emb.") for key in shapes):
        has_first = any(key.startswith("conditioner.embedders.0.transformer.") for key in shapes)
        return "sdxl" if has_first or not any(key.startswith("conditioner.") for key in shapes) else "sdxl-refiner"
    return "sd2" if any(key.startswith("cond_stage_model.model.") for key in shapes) or width == 1024 else "sd1"


def _context_width(shapes: Shapes) -> int | None:
    """Channels of what the U-Net attends to; None: it has no cross-attention."""
    keys = (key for key in shapes if key.startswith(UNET) and key.endswith("attn2.to_k.weight"))
    return next((int(shapes[key][1]) for key in keys), None)


def _unet_sizes(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Widths and depths of a U-Net in the original layout, as arguments of `UNet2DConditionModel`."""
    per_level, levels = int(config["layers_per_block"]) + 1, range(len(config["block_out_channels"]))
    blocks = [f"{UNET}input_blocks.{1 + level * per_level}." for level in levels]
    widths = [int(shapes[f"{block}0.out_layers.3.weight"][0]) for block in blocks]
    sizes: dict[str, Any] = {"block_out_channels": widths, "cross_attention_dim": _context_width(shapes)}
    if isinstance(config["attention_head_dim"], list):  # diffusers means the number of heads
        sizes["attention_head_dim"] = [max(width // HEAD_WIDTH, 1) for width in widths]
    if label := shapes.get(f"{UNET}label_emb.0.0.weight"):
        sizes["projection_class_embeddings_input_dim"] = int(label[1])
    depths = [_count(shapes, rf"{re.escape(block)}1\.transformer_blocks\.(\d+)\.") for block in blocks]
    middle = _count(shapes, rf"{re.escape(UNET)}middle_block\.1\.transformer_blocks\.(\d+)\.")
    return sizes | {"transformer_layers_per_block": [depth or middle for depth in depths]}


def _vae_sizes(shapes: Shapes) -> dict[str, Any]:
    """Widths of a VAE in the original layout, as arguments of `AutoencoderKL`."""
    levels = range(_count(shapes, rf"{re.escape(VAE)}encoder\.down\.(\d+)\."))
    return {"block_out_channels": [int(shapes[f"{VAE}encoder.down.{i}.block.0.conv2.weight"][0]) for i in levels]}


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that the pattern's group takes at the beginning of a name."""
    return max((int(match[1]) + 1 for key in shapes if (match := re.match(pattern, key))), default=0)


class SingleFileText(ClipEncoders):
    """The text encoders of a single file; CLIP's tokenizer, which no such file has, comes with open_clip.

    Args:
        weights: of the text encoders, with the original names.
        configs: component -> configuration of the public model's.
    """

    def __init__(
        self,
        path: Path,
        weights: Mapping[str, Tensor],
        configs: Mapping[str, Mapping[str, Any]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__({part: _CLASSES[part] for part in configs}, device=device, dtype=dtype)
        self.path, self.weights, self.configs = path, weights, configs

    def load(self, part: str) -> tuple[Any, Any]:
        import transformers
        from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

        kind = getattr(transformers, self.parts[part])
        second = "conditioner.embedders.1." if "text_encoder" in self.configs else "conditioner.embedders.0."
        prefixes = (second,) if part == "text_encoder_2" else ("cond_stage_model.", "conditioner.embedders.0.")
        weights = {key: value for key, value in self.weights.items() if key.startswith(prefixes)}
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps({**self.configs[part], **_text_sizes(weights)}))
            try:
                encoder = create_diffusers_clip_model_from_ldm(kind, weights, config=folder, local_files_only=True)
            except Exception as error:  # tensors that are missing or of another shape: several kinds
                raise BackboneError(f"{self.path}: its {part} cannot be read ({one_line(error)})") from None
        pad = END if part == "text_encoder" and self.configs[part].get("hidden_act") == "quick_gelu" else 0
        return ClipTokenizer(pad), encoder


def _text_sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Widths and depths of a text encoder in either original layout, as arguments of `CLIPTextConfig`."""
    shapes = {key: value.shape for key, value in weights.items()}
    width = next(s[1] for key, s in shapes.items() if key.endswith("token_embedding.weight"))
    layers = max(_count(shapes, r".*\.layers\.(\d+)\."), _count(shapes, r".*\.resblocks\.(\d+)\."))
    inner = next(s[0] for key, s in shapes.items() if key.endswith(("mlp.fc1.weight", "mlp.c_fc.weight")))
    # the original program of Stable Diffusion 2 reads the last layer but one: diffusers leaves the last one out
    dropped = 1 if any(key.startswith("cond_stage_model.model.") for key in shapes) else 0
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "num_hidden_layers": layers - dropped,
        "projection_dim": next((s[1] for key, s in shapes.items() if key.endswith("text_projection")), width),
    }


class ClipTokenizer:
    """CLIP's byte-pair encoding, as the text encoders of Stable Diffusion want it.

    Args:
        pad: the token behind the end: its own end (Stable Diffusion 1), or 0.
    """

    model_max_length = TOKENS

    def __init__(self, pad: int) -> None:
        from open_clip import SimpleTokenizer

        self.pad, self._tokenizer = pad, SimpleTokenizer()

    def __call__(self, prompts: Sequence[str], **options: Any) -> Any:
        """Token numbers (B, 77) and the mask of those that are no padding, as transformers' tokenizers give them."""
        from transformers import BatchEncoding

        rows = [[START, *self._tokenizer.encode(prompt)[: TOKENS - 2], END] for prompt in prompts]
        padded = [row + [self.pad] * (TOKENS - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (TOKENS - len(row)) for row in rows]
        return BatchEncoding({"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)})


_MIXINS = {  # class of the network -> diffusers' reader of its LoRA files
    "UNet2DConditionModel": "StableDiffusionLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
}


def parse_lora(text: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE:SCALE``.

    >>> parse_lora("style.safetensors:0.5")
    (PosixPath('style.safetensors'), 0.5)

    Raises:
        BackboneError: there is no such file, or the scale is no finite number.
    """
    if Path(text).is_file():
        return Path(text), 1.0
    name, colon, scale = text.rpartition(":")
    if colon and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", scale):
        return Path(name), float(scale)
    if colon and Path(name).is_file():
        raise BackboneError(f"{text}: the scale of a LoRA must be a number, got {scale!r}")
    return Path(text), 1.0


def _lora_key(key: str, network: nn.Module) -> str:
    """A key of a LoRA as diffusers writes it today: one of peft, of attention processors, or of a network alone.

    kohya's keys, which have underscores, stay.
    """
    key = key.removeprefix("base_model.model.")
    key = re.sub(r"\.processor\.(to_\w+?)_lora\.(down|up)\.", r".\1.lora.\2.", key)
    key = key.replace(".to_out.lora.", ".to_out.0.lora.")
    alone = key.partition(".")[0] in dict(network.named_children())
    return f"{'unet' if type(network).__name__ == 'UNet2DConditionModel' else 'transformer'}.{key}" if alone else key


def add_lora(backbone: Backbone, text: str) -> None:
    """Merge a LoRA into a diffusion backbone; its part for the text encoders is applied whenever a prompt is encoded.

    Args:
        text: ``FILE`` or ``FILE:SCALE``.

    Raises:
        BackboneError: the file is missing, damaged or no LoRA; it belongs to another model; or peft is missing.
    """
    path, scale = parse_lora(text)
    weights = {_lora_key(key, backbone.network): value for key, value in read_weights(path).items()}
    if "LoRA" not in describe_weights(weights)[0]:
        raise BackboneError(f"{path}: is no LoRA: it holds {', '.join(sorted(weights)[:2])}, ...")
    network = backbone.network
    kind = type(network).__name__
    if not isinstance(backbone, LatentBackbone) or kind not in _MIXINS:
        raise BackboneError(f"{path}: a LoRA goes with {', '.join(_MIXINS)}, {backbone.name} is a {kind}")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise BackboneError(f"{path}: LoRA files need peft: pip install peft") from None
    from diffusers.loaders import lora_pipeline

    is_unet = kind == "UNet2DConditionModel"
    large = is_unet and network.config.addition_embed_type == "text_time"
    reader: Any = getattr(lora_pipeline, "StableDiffusionXLLoraLoaderMixin" if large else _MIXINS[kind])
    before = sum(1 for _ in network.modules())
    try:
        read = reader.lora_state_dict(dict(weights), **({"unet_config": network.config} if large else {}))
        state, alphas = read if isinstance(read, tuple) else (read, None)
        prefix = "unet" if is_unet else "transformer"
        network.load_lora_adapter(dict(state), prefix=prefix, network_alphas=alphas, adapter_name="lora")
        fits = sum(1 for _ in network.modules()) > before
        if fits:
            network.fuse_lora(lora_scale=scale, adapter_names=["lora"])
            network.unload_lora()
    except Exception as error:  # names and shapes of another model: KeyError, RuntimeError, ValueError and others
        raise BackboneError(
            f"{path}: does not fit {backbone.name}, it belongs to another model ({one_line(error)})"
        ) from None
    for_text = any(key.startswith("text_encoder") for key in state)
    if not fits and not for_text:
        raise BackboneError(f"{path}: holds nothing for a {kind}, it belongs to another kind of model")
    if for_text and backbone.text is not None:
        backbone.text.adapters.append(partial(_adapt_text, reader, dict(state), alphas, scale))
    backbone.source = f"{backbone.source} with {path.name}" + (f" x {scale:g}" if scale != 1 else "")


def _adapt_text(reader: Any, state: dict[str, Any], alphas: Any, scale: float, part: str, encoder: Any) -> None:
    if any(key.startswith(f"{part}.") for key in state):
        reader.load_lora_into_text_encoder(state, alphas, encoder, prefix=part, lora_scale=scale)
