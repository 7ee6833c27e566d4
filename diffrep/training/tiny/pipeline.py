"""``diffrep train tiny``: scenes, autoencoder, diffusion model and vision transformer, then the model folders.

Everything is resumable: called again with the same settings and work folder, it goes on where it was.
"""

from __future__ import annotations

import json
import platform
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import diffrep
from diffrep.files import forget_origin, replace_folder
from diffrep.scenes import SEEN, UNSEEN, SceneSet, render_set
from diffrep.training.loop import FitSettings
from diffrep.training.tiny.correspondence import LabelSettings, check_unseen
from diffrep.training.tiny.dino import DinoSettings, train_dino, write_vit
from diffrep.training.tiny.probe import ProbePairs, probe_unet, probe_vit, unet_maps, vit_maps
from diffrep.training.tiny.tokenizer import write_tokenizer
from diffrep.training.tiny.unet import CaptionedDenoiser, UNetSettings, build_scheduler, tokenize, train_unet
from diffrep.training.tiny.vae import VaeSettings, psnr, train_vae

RECOMMENDED = {  # diffrep.json: how the model is best used as a backbone
    "taps": ["up.2.resnet.0"],
    "sizing": {"mode": "pad", "size": 128, "fill": "edge"},
    "conditions": {"timestep": 50, "posterior": "mean"},
}


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

    @classmethod
    def smoke(cls, work: Path, output: Path) -> TinyTraining:
        """All stages in well under a minute on one core; the models are useless."""

        def short(run: FitSettings, steps: int = 2) -> FitSettings:
            return replace(run, steps=steps, minutes=None)

        labels = LabelSettings(members=2, queries=4)
        vae, unet, dino = VaeSettings(), UNetSettings(), DinoSettings()
        return cls(
            work=work,
            output=output,
            scenes=2 * len(SEEN),
            workers=1,
            probe_pairs=1,
            vae=replace(
                vae,
                channels=(8, 8, 8, 8),
                groups=2,
                batch_size=2,
                linear=short(vae.linear, 10),
                fit=short(vae.fit),
            ),
            unet=replace(
                unet,
                channels=(16, 16, 16),
                groups=8,
                labels=labels,
                batch_size=4,
                label_free=short(unet.label_free),
                joint=short(unet.joint),
            ),
            dino=replace(
                dino,
                width=32,
                depth=2,
                heads=2,
                labels=labels,
                prototypes=8,
                batch_size=4,
                label_free=short(dino.label_free),
                joint=short(dino.joint),
            ),
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
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            beside = pool.submit(_train_vit, config, progress)
            vae, denoisers = _train_diffusion(config, progress)
            students = beside.result()
    else:
        vae, denoisers = _train_diffusion(config, progress)
        students = _train_vit(config, progress)
    folder = config.output
    write_pipeline(vae, denoisers[1], folder / "tiny")
    replace_folder(folder / "tiny-dino", lambda where: write_vit(students[1], config.dino, where))
    card = {
        "what": "demonstration models trained on rendered scenes, jointly with the renderer's dense labels",
        "trained by": f"diffrep {diffrep.__version__}, `diffrep train tiny`",
        "date": datetime.now(timezone.utc).date().isoformat(),
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
        "steps": {name: _last_step(config.work / name) for name in _RUNS},
        "parameters": {
            "vae": _count(vae),
            "unet": _count(denoisers[1].unet),
            "text_encoder": _count(denoisers[1].text_encoder),
            "vit": _count(students[1]),
        },
        "validation": measure(config, vae, denoisers, students),
        "settings": _jsonable(asdict(config)),
    }
    text = json.dumps(card, indent=2) + "\n"
    for name in ("tiny", "tiny-dino"):
        (folder / name / "model-card.json").write_text(text)
    return card


_RUNS = ("linear", "vae", "unet-label-free", "unet-joint", "dino-label-free", "dino-joint")


def _train_diffusion(config: TinyTraining, progress: bool) -> tuple[Any, tuple[CaptionedDenoiser, CaptionedDenoiser]]:
    with _threads(config.threads):
        scenes = SceneSet(config.work / "scenes")
        vae = train_vae(scenes, config.vae, config.work, progress=progress)
        return vae, train_unet(vae, scenes, config.unet, config.work, progress=progress)


def _train_vit(config: TinyTraining, progress: bool) -> tuple[Any, Any]:
    with _threads(config.threads):
        return train_dino(SceneSet(config.work / "scenes"), config.dino, config.work, progress=progress)


class _threads:
    """Run with this number of torch threads, and give the old number back."""

    def __init__(self, count: int) -> None:
        self.count, self.before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.count)

    def __exit__(self, *error: object) -> None:
        torch.set_num_threads(self.before)


def measure(
    config: TinyTraining, vae: Any, denoisers: tuple[CaptionedDenoiser, CaptionedDenoiser], students: tuple[Any, Any]
) -> dict[str, Any]:
    """Validation figures: PSNR of the autoencoder, PCK@0.1 label-free and after joint training."""
    from transformers import CLIPTokenizer

    null = tokenize(CLIPTokenizer.from_pretrained(config.work / "tokenizer"), [""])[0]
    found: dict[str, Any] = {}
    for group, categories in (("seen", SEEN), ("unseen", UNSEEN)):
        pairs = ProbePairs.render(config.probe_pairs, categories=categories)
        found[group] = {"pairs": len(pairs.sources), "points": sum(map(len, pairs.asked))}
        if group == "seen":
            found["psnr"] = psnr(vae, pairs.sources)
        for phase, denoiser, vit in zip(("label-free", "joint"), denoisers, students, strict=True):
            found[group][phase] = {
                "unet": probe_unet(pairs, vae, denoiser, null),
                "vit": probe_vit(pairs, vit),
                "fused": fused_pck(pairs, vae, denoiser, null, vit),
            }
    return found


def fused_pck(pairs: ProbePairs, vae: Any, denoiser: CaptionedDenoiser, null: Tensor, vit: Any) -> float:
    """PCK@0.1 of the last trained tap and the ViT side by side, each normalised, with equal weights."""
    sides = []
    for images in (pairs.sources, pairs.targets):
        sides.append([unet_maps(vae, denoiser, null, images)[-1], vit_maps(vit, images)])
    return pairs.pck(*sides)


def write_pipeline(vae: Any, denoiser: CaptionedDenoiser, folder: Path) -> None:
    """Write a complete `StableDiffusionPipeline` folder in half precision, all of it or nothing."""
    from transformers import CLIPTokenizer

    from diffrep.scenes import VOCABULARY

    length = denoiser.settings.caption_length

    def write(where: Path) -> None:
        from diffusers import StableDiffusionPipeline

        write_tokenizer(where / "tokenizer", VOCABULARY, length=length)
        tokenizer = CLIPTokenizer.from_pretrained(where / "tokenizer")
        pipeline: Any = StableDiffusionPipeline(
            vae=half(vae),
            unet=half(denoiser.unet),
            # transformers loads a text encoder in the precision of its file, diffusers the others in float32
            text_encoder=denoiser.text_encoder.float(),
            tokenizer=tokenizer,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(where, safe_serialization=True)
        forget_origin(where)
        shutil.rmtree(where / "tokenizer")  # the files that every version of transformers reads, and no others
        write_tokenizer(where / "tokenizer", VOCABULARY, length=length)
        (where / "diffrep.json").write_text(json.dumps(RECOMMENDED, indent=2) + "\n")

    replace_folder(folder, write)


def half(module: nn.Module) -> nn.Module:
    from copy import deepcopy

    return deepcopy(module).half().to(memory_format=torch.contiguous_format)


def _last_step(run: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {"steps": rows[-1]["step"], "minutes": round(rows[-1]["seconds"] / 60, 1)} if rows else {}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
