"""``diffrep train tiny``: scenes, autoencoder, diffusion model and vision transformer, then the model folders.

Everything is resumable: called again with the same settings and work folder, it goes on where it was.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

import diffrep
from diffrep.backbones.text import PROMPTS, TextEncoders
from diffrep.files import forget_origin, replace_folder, save_weights, write_document
from diffrep.processes import process_pool
from diffrep.scenes import SEEN, UNSEEN, SceneSet, render_set
from diffrep.settings import check
from diffrep.training.loop import FitSettings
from diffrep.training.tiny.crops import LabelSettings, check_unseen
from diffrep.training.tiny.dino import DinoSettings, train_dino, write_vit
from diffrep.training.tiny.measures import measure
from diffrep.training.tiny.unet import (
    TOKENIZER,
    CaptionedDenoiser,
    UNetSettings,
    build_scheduler,
    caption_tokenizer,
    train_unet,
)
from diffrep.training.tiny.vae import VaeSettings, train_vae

RECOMMENDED = {  # diffrep.json: how the model is best used as a backbone
    "taps": ["up.2.resnet.0"],
    "sizing": {"mode": "pad", "size": 128, "fill": "edge"},
    "conditions": {"timestep": 50, "posterior": "mean"},
}
RUNS = ("linear", "vae", "unet-label-free", "unet-joint", "dino-label-free", "dino-joint")  # folders of their logs


@dataclass(frozen=True, kw_only=True)
class TinyTraining:
    """Train the embedded models again, from rendered scenes alone."""

    work: Path = Path("runs/tiny")  # scenes, checkpoints and logs; a few GB
    output: Path = Path("runs/tiny/models")  # where the folders tiny and tiny-dino are written
    scenes: int = 24000  # rendered for training, of the categories that training may see
    workers: int = 2  # processes: rendering, and the two networks side by side
    threads: int = 1  # torch threads of each
    probe_pairs: int = 10  # validation pairs of each category in the card
    vae: VaeSettings = field(default_factory=VaeSettings)
    unet: UNetSettings = field(default_factory=UNetSettings)
    dino: DinoSettings = field(default_factory=DinoSettings)

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def smoke(cls, work: Path, output: Path) -> TinyTraining:
        """All stages in well under a minute on one core; the models are useless."""

        def short(settings: Any, **small: Any) -> Any:
            """The settings of a network with other values, and runs of two steps."""
            runs = {
                k: replace(v, steps=2, minutes=None) for k, v in vars(settings).items() if isinstance(v, FitSettings)
            }
            return replace(settings, **runs, **small)

        labels = LabelSettings(members=2, queries=4)
        vae = short(VaeSettings(), channels=(8,) * 4, groups=2, batch_size=2)
        return cls(
            work=work,
            output=output,
            scenes=2 * len(SEEN),
            workers=1,
            probe_pairs=1,
            vae=replace(vae, linear=replace(vae.linear, steps=10)),
            unet=short(UNetSettings(), channels=(16, 16, 16), groups=8, labels=labels, batch_size=4),
            dino=short(DinoSettings(), width=32, depth=2, heads=2, labels=labels, prototypes=8, batch_size=4),
        )


def train_tiny(config: TinyTraining, *, progress: bool = True) -> dict[str, Any]:
    """Train and write the models. Returns the model card, which is also written beside the weights.

    Raises:
        ValueError: the work folder holds a run or scenes of other settings, or scenes of unseen categories.
    """
    config.work.mkdir(parents=True, exist_ok=True)
    scenes = render_set(config.work / "scenes", "train", config.scenes, workers=config.workers, progress=progress)
    check_unseen(scenes)
    if config.workers > 1:
        with process_pool(1) as pool:
            beside = pool.submit(_train_vit, config, progress)
            vae, denoisers = _train_diffusion(config, progress)
            vits = beside.result()
    else:
        vae, denoisers = _train_diffusion(config, progress)
        vits = _train_vit(config, progress)
    replace_folder(config.output / "tiny", lambda where: write_pipeline(vae, denoisers[1], where))
    replace_folder(config.output / "tiny-dino", lambda where: write_vit(vits[1], config.dino, where))
    parts = {"vae": vae, "unet": denoisers[1].unet, "text_encoder": denoisers[1].text_encoder, "vit": vits[1]}
    card = card_head(
        "demonstration models trained on rendered scenes, jointly with the renderer's dense labels", "tiny"
    )
    card |= {
        "device": f"CPU ({platform.machine()}), {config.workers} processes of {config.threads} threads",
        "torch": torch.__version__,
        "data": {
            "scenes": len(scenes),
            "categories": list(scenes.settings.categories),
            "never trained on": list(UNSEEN),
            "size": scenes.settings.size,
            "renderer": scenes.settings.renderer,
            "labels": "part ids and canonical coordinates, joint phases only",
        },
        "steps": {name: steps_of(log_rows(config.work / name)) for name in RUNS},
        "parameters": {name: count_parameters(part) for name, part in parts.items()},
        "validation": measure(config.probe_pairs, vae, denoisers, vits),
        "settings": json.loads(json.dumps(asdict(config), default=str)),
    }
    for name in ("tiny", "tiny-dino"):
        write_card(config.output / name, card)
    return card


def _train_diffusion(config: TinyTraining, progress: bool) -> tuple[Any, list[CaptionedDenoiser]]:
    with _threads(config.threads):
        scenes = SceneSet(config.work / "scenes")
        vae = train_vae(scenes, config.vae, config.work, progress=progress)
        return vae, train_unet(vae, scenes, config.unet, config.work, progress=progress)


def _train_vit(config: TinyTraining, progress: bool) -> list[Any]:
    with _threads(config.threads):
        return train_dino(SceneSet(config.work / "scenes"), config.dino, config.work, progress=progress)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run with this number of torch threads, and give the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_pipeline(vae: Any, denoiser: CaptionedDenoiser, folder: Path) -> None:
    """Write a complete `StableDiffusionPipeline` folder in half precision."""
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline(
        vae=half(vae),
        unet=half(denoiser.unet),
        # transformers loads a text encoder in the precision of its file, diffusers the others in float32
        text_encoder=denoiser.text_encoder.float(),
        tokenizer=caption_tokenizer(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    forget_origin(folder)
    shutil.rmtree(folder / "tokenizer")  # the files that every version of transformers reads, and no others
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    save_weights(folder / PROMPTS, {"": TextEncoders(str(folder)).encode([""])[""].context})
    write_document(folder / "diffrep.json", RECOMMENDED)


# -- what every card of a trained model says ----------------------------------------------------------------


def half(module: nn.Module) -> Any:
    """A copy in half precision, as it is written."""
    return deepcopy(module).half().to(memory_format=torch.contiguous_format)


def card_head(what: str, command: str) -> dict[str, Any]:
    """The first entries of a model card."""
    return {
        "what": what,
        "trained by": f"diffrep {diffrep.__version__}, `diffrep train {command}`",
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write ``model-card.json``."""
    write_document(folder / "model-card.json", card)


def log_rows(run: Path) -> list[dict[str, Any]]:
    """The log of a folder of `fit`."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def steps_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How long a run took."""
    return {"steps": rows[-1]["step"], "minutes": round(rows[-1]["seconds"] / 60, 1)} if rows else {}


def count_parameters(module: nn.Module) -> int:
    """Numbers in a module's parameters."""
    return sum(p.numel() for p in module.parameters())
