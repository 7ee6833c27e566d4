"""``diffrep info``: which backbones there are, and what one of them gives."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from diffrep.backbones import Backbone, load_backbone
from diffrep.backbones.loading import EMBEDDED, HUB, TIMM


@dataclass(frozen=True)
class Info:
    """List the known backbones, or the taps of one with channels, strides, parameters and the origin of its weights."""

    backbone: Annotated[str | None, tyro.conf.Positional] = None  # a name, a folder or a hub id
    all: bool = False  # also the taps inside transformer blocks and residual branches
    json: bool = False  # machine-readable

    def run(self) -> None:
        if self.backbone is None:
            print(json.dumps(known_backbones(), indent=2) if self.json else _list_text())
            return
        facts = describe(load_backbone(self.backbone, weights=False))
        if self.json:
            print(json.dumps(facts, indent=2))
        else:
            print(_facts_text(facts, everything=self.all))


def known_backbones() -> dict[str, dict[str, str]]:
    """Group -> name -> what it is."""
    return {
        "embedded": EMBEDDED,
        "diffusers folders on the hub (fetched when you ask for them)": HUB,
        "vision transformers of timm (fetched when you ask for them)": TIMM,
    }


def describe(backbone: Backbone) -> dict[str, object]:
    """What a backbone is and gives, JSON-ready."""
    return {
        "backbone": backbone.name,
        "kind": type(backbone).__name__,
        "weights": backbone.source,
        "denoises": backbone.denoises,
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in backbone.parts.items()},
        "recommended": asdict(backbone.recommended),
        "taps": [asdict(tap) for tap in backbone.taps()],
    }


def _list_text() -> str:
    lines = []
    for group, names in known_backbones().items():
        lines += [f"{group}:", *(f"  {name:<18} {what}" for name, what in names.items()), ""]
    lines.append(
        "also: a local folder (diffusers, timm or DINOv2 layout), a hub id, timm:ARCHITECTURE,"
        " open_clip:MODEL/PRETRAINED\n`diffrep info NAME` lists its taps"
    )
    return "\n".join(lines)


def _facts_text(facts: dict, *, everything: bool) -> str:
    lines = [f"{facts['backbone']}: {facts['kind']}, weights from {facts['weights']}"]
    lines += [f"  {name}: {count / 1e6:.2f} M parameters" for name, count in facts["parameters"].items()]
    recommended = facts["recommended"]
    lines.append(f"  used by default: taps {', '.join(recommended['taps'])}; {_pairs(recommended['sizing'])}")
    if facts["denoises"]:
        lines.append(f"  conditions: {_pairs(recommended['conditions'])}")
    fine = (".block.", ".increment", ".query", ".key", ".value")
    taps = [t for t in facts["taps"] if everything or not any(f in t["name"] for f in fine)]
    width = max(len(t["name"]) for t in taps)
    lines += ["", f"  {'tap':<{width}}  channels  stride  module"]
    lines += [f"  {t['name']:<{width}}  {t['channels']:>8}  {t['stride']:>6}  {t['module']}" for t in taps]
    if len(taps) < len(facts["taps"]):
        lines.append(f"  ... and {len(facts['taps']) - len(taps)} finer ones: diffrep info {facts['backbone']} --all")
    return "\n".join(lines)


def _pairs(values: dict) -> str:
    return ", ".join(f"{key} {value!r}" for key, value in values.items())
