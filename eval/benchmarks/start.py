"""From process start to picture: the commands on the embedded models against scripts that call the libraries.

The plain way is what one writes with diffusers, transformers and timm: the same folders, images and passes of the
networks, without anything else that the commands do. Processor seconds of whole processes, in turns.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffrep.settings import check

if TYPE_CHECKING:  # the child begins with nothing loaded
    from diffrep.eval.benchmarks.timing import Row

SIDE = 128  # pixels of the images, as the embedded models were trained on
COMMANDS = {
    "match": ["match", "a.png", "b.png", "--points", "40,40", "-o", "match.png"],
    "depth": ["depth", "a.png", "-o", "depth"],
}
Stage = dict[str, float]


@dataclass(frozen=True)
class StartBenchmark:
    """Measure `diffrep match` and `diffrep depth` on the embedded models, and where their time goes."""

    repeats: int = 5
    commands: tuple[Literal["match", "depth"], ...] = ("match", "depth")

    def __post_init__(self) -> None:
        check(self)

    def run(self) -> list[Row]:
        """Time both sides in turns, print the table and the stages, and return the rows."""
        from diffrep.eval.benchmarks.timing import table

        rows, lines = [], []
        for command in self.commands:
            row, stages = self._measured(command)
            rows.append(row)
            for side, parts in stages.items():
                lines.append(f"{command}, {side}: " + ", ".join(f"{name} {t:.2f} s" for name, t in parts.items()))
        print("\n".join([table(rows), *lines]))
        return rows

    def _measured(self, command: str) -> tuple[Row, dict[str, Stage]]:
        from diffrep.eval.benchmarks.timing import Row, summary

        seconds: dict[str, list[float]] = {"plain": [], "ours": []}
        stages: dict[str, Stage] = {}
        with tempfile.TemporaryDirectory() as folder:
            _write_images(Path(folder))
            child = [sys.executable, "-W", "ignore", "-m", "diffrep.eval.benchmarks.start", command]
            sides = {"plain": [*child, "plain"], "ours": [sys.executable, "-m", "diffrep", *COMMANDS[command]]}
            for _ in range(self.repeats):
                for side, program in sides.items():
                    seconds[side].append(_run(program, folder)[0])
            told = {side: json.loads(_run([*child, side], folder)[1].splitlines()[-1]) for side in sides}
        for side, measured in told.items():
            stages[side] = {name: measured[name] for name in ("import", "load", "compute")}
        values = [told[side]["value"] for side in sides]
        equality = f"largest difference of the U-Net's output {abs(values[1] - values[0]) / abs(values[0]):.1e}"
        plain, ours = (summary(seconds[side]) for side in sides)
        return Row(f"diffrep {command}, whole process, {SIDE} px", plain, ours, equality), stages


def _run(program: list[str], folder: str) -> tuple[float, str]:
    """Processor seconds of a process, and what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def _write_images(folder: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        Image.effect_noise((SIDE, SIDE), 80).convert("RGB").save(folder / f"{name}.png")


@contextmanager
def counted_imports() -> Iterator[list[float]]:
    """Sum up in the body the processor seconds of the outermost imports."""
    plain, depth, seconds = builtins.__import__, 0, [0.0]

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal depth
        start, depth = time.process_time(), depth + 1
        try:
            return plain(*arguments, **named)
        finally:
            depth -= 1
            if not depth:
                seconds[0] += time.process_time() - start

    builtins.__import__ = counting
    try:
        yield seconds
    finally:
        builtins.__import__ = plain


def _our_match() -> tuple[Any, Callable[[], object]]:
    from diffrep.draw import draw_matches
    from diffrep.files import write_image
    from diffrep.images import load_image
    from diffrep.matching import check_points
    from diffrep.recipes import Correspondence

    correspondence = Correspondence("tiny")

    def compute() -> None:
        a, b = load_image("a.png"), load_image("b.png")
        points = check_points([(40, 40)], (a.height, a.width))
        matches = correspondence.match(a, b, points=points)
        write_image(Path("match.png"), draw_matches(a, b, points, matches))

    return next(backbone for backbone in correspondence.backbones if backbone.denoises).network, compute


def _our_depth() -> tuple[Any, Callable[[], object]]:
    from diffrep.heads.loading import load_head

    head = load_head("tiny-depth", fold=False)
    return head.model.network.unet, lambda: head("a.png").save("depth.png")


def _plain(task: str) -> tuple[Any, Callable[[], object]]:
    import numpy as np
    import timm
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import CLIPTextModel, CLIPTokenizer

    from diffrep.backbones.repositories import MODELS

    base = MODELS / "tiny"
    folder = base if task == "match" else MODELS / f"tiny-{task}"
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    vae = AutoencoderKL.from_pretrained(base / "vae").eval()
    text = CLIPTextModel.from_pretrained(base / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    vit: Any = None
    if task == "match":
        config = json.loads((MODELS / "tiny-dino" / "config.json").read_text())
        vit = timm.create_model(config["architecture"], **config["model_args"]).eval()
        vit.load_state_dict(load_file(MODELS / "tiny-dino" / "model.safetensors"))

    @torch.inference_mode()
    def compute() -> None:
        names = ("a.png", "b.png") if task == "match" else ("a.png",)
        images = [torch.from_numpy(np.array(Image.open(name))).permute(2, 0, 1) / 255 for name in names]
        pixels = torch.stack(images)
        context = text(tokenizer([""], return_tensors="pt").input_ids)[0].expand(len(pixels), -1, -1)
        labels = torch.ones(len(pixels), 4) if unet.config.class_embed_type else None
        latents = vae.encode(pixels * 2 - 1).latent_dist.mean
        predicted = unet(latents, 1, encoder_hidden_states=context, class_labels=labels).sample
        if vit is not None:
            vit.forward_features(pixels)
        drawn = vae.decode(predicted[:1]).sample[0].clamp(-1, 1) / 2 + 0.5 if vit is None else pixels[0]
        Image.fromarray((drawn * 255).byte().permute(1, 2, 0).numpy()).save(f"{task}.png")

    return unet, compute


def main(command: str, side: str) -> None:
    """Run one side in stages and print their processor seconds as JSON."""
    with counted_imports() as seconds:
        begun = time.process_time()
        load = {"match": _our_match, "depth": _our_depth}[command] if side == "ours" else lambda: _plain(command)
        unet, compute = load()
        loaded, imported = time.process_time() - begun, seconds[0]
        compute()
        total = time.process_time() - begun
    import torch

    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, unet.config.in_channels, 16, 16, generator=generator)
        context = torch.randn(1, 4, unet.config.cross_attention_dim, generator=generator)
        named = {"class_labels": torch.ones(1, 4)} if unet.config.class_embed_type else {}
        value = float(unet(latents, 1, encoder_hidden_states=context, **named).sample.double().square().mean())
    compute_time = total - loaded - (seconds[0] - imported)
    print(json.dumps({"import": seconds[0], "load": loaded - imported, "compute": compute_time, "value": value}))


if __name__ == "__main__":
    main(*sys.argv[1:])
