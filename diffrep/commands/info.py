"""``diffrep info``: which backbones, published models and recipes there are, and what one backbone gives."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from diffrep.commands.options import BackboneOptions
from diffrep.settings import Conditions

if TYPE_CHECKING:
    from diffrep.backbones import Backbone


@dataclass(frozen=True, kw_only=True)
class Info(BackboneOptions):
    """List the known backbones, or the taps of one with channels, strides, parameters and the origin of its weights.

    Of a head it says what it is, what uses it and where its timesteps lie.

    `diffrep info models` lists published models to use for each task, `diffrep info recipes` the recipes of matching.
    No weights are read but those of checkpoints in one file.
    """

    backbone: Annotated[str | None, tyro.conf.Positional] = None  # a name, a folder, a file, a hub id; models; recipes
    system: bool = False  # this machine's devices and the libraries' versions, for reports of faults
    all: bool = False  # also the taps inside transformer blocks and residual branches
    json: bool = False  # machine-readable

    def run(self) -> None:
        facts: Any
        text: Callable[[Any], str]
        options = self.lora or self.variant or self.revision
        if self.system:
            if self.backbone is not None or options or self.all:
                raise ValueError("--system goes with no other option than --json")
            from diffrep.devices import describe_system

            facts, text = describe_system(_LIBRARIES), _system_text
        elif self.backbone in (None, "models", "recipes"):
            if options or self.all:
                raise ValueError("--all, --lora, --variant and --revision go with the name of a backbone")
            lists: dict[str, tuple[Callable[[], Any], Callable[[Any], str]]] = {
                "models": (published_models, _models_text),
                "recipes": (known_recipes, _recipes_text),
            }
            read, text = lists.get(str(self.backbone), (known_backbones, _list_text))
            facts = read()
        else:
            from diffrep.backbones import BackboneError, load_backbone
            from diffrep.backbones.repositories import with_options
            from diffrep.heads.loading import head_in

            name, head = self.named(self.backbone), head_in(self.named(self.backbone))
            try:
                facts = describe(load_backbone(name, weights=False))
            except BackboneError:
                if head is None:
                    raise
                if self.all or self.lora:
                    raise ValueError(f"{name}: is a head and no backbone, of which --all and --lora are") from None
                facts = {}
            if head is not None:
                model = shlex.quote(with_options(self.backbone, variant=self.variant, revision=self.revision))
                command = head.pop("command")
                facts["head"] = head | {"use": f"diffrep {command} --model {model}"}
            text = _all_taps_text if self.all else _facts_text
        print(json.dumps(facts, indent=2) if self.json else text(facts))


_LIBRARIES = (  # those on which results and faults depend most
    *("torch", "torchvision", "numpy", "Pillow", "diffusers", "transformers", "timm", "open_clip_torch", "accelerate"),
    *("huggingface_hub", "safetensors", "faiss-cpu", "faiss-gpu", "scikit-learn", "scipy", "ray", "gradio", "av"),
)


def known_backbones() -> dict[str, dict[str, str]]:
    """Group -> name -> what it is."""
    from diffrep.backbones.repositories import CLEANDIFT, EMBEDDED, REPOSITORIES, TIMM

    return {
        "embedded": EMBEDDED,
        "diffusers folders on the hub (fetched when you ask for them; the first that answers)": {
            name: ", ".join(ids) for name, ids in REPOSITORIES.items()
        },
        "fine-tuned U-Nets": {name: f"{base} with CompVis/cleandift" for name, (base, _) in CLEANDIFT.items()},
        "vision transformers of timm (fetched when you ask for them)": TIMM,
    }


def published_models() -> list[dict[str, Any]]:
    """Published models to use where the embedded ones are too small; of each task the first is recommended."""
    from diffrep.tasks import MODELS

    return [asdict(model) for model in MODELS]


def known_recipes() -> list[dict[str, Any]]:
    """The recipes of matching: name, backbones, source, the licences and gigabytes in 16 bits of their weights."""
    from diffrep.backbones.repositories import WEIGHTS
    from diffrep.recipes import RECIPES

    recipes = []
    for name, recipe in RECIPES.items():
        backbones = [reading.backbone for reading in recipe.readings]
        licences, sizes = zip(*(WEIGHTS[backbone] for backbone in backbones), strict=True)
        facts = {"licence": "; ".join(dict.fromkeys(licences)), "gigabytes": round(sum(sizes), 2)}
        recipes.append({"name": name, "backbones": backbones, "source": recipe.source, **facts})
    return recipes


def describe(backbone: Backbone) -> dict[str, Any]:
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


def _list_text(groups: dict[str, dict[str, str]]) -> str:
    lines = []
    for group, names in groups.items():
        lines += [f"{group}:", *(f"  {name:<18} {what}" for name, what in names.items()), ""]
    lines.append(
        "also: a local folder (diffusers, timm or DINOv2 layout), a checkpoint in one file (Stable Diffusion 1.x,"
        "\n2.x, XL, guided-diffusion), a hub id, timm:ARCHITECTURE, open_clip:MODEL/PRETRAINED"
        "\n`diffrep info NAME` lists its taps, `diffrep info models` what to use for which task,"
        "\n`diffrep info recipes` the recipes"
    )
    return "\n".join(lines)


def _models_text(models: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            model["job"],
            model["option"],
            f"{model['gigabytes']:g} GB",
            model["about"],
            model["licence"] or "see its page",
        )
        for model in models
    ]
    return _table(("task", "option", "memory", "model", "licence"), rows) + (
        "\n\nWeights come from the hub when you name them, or from a local folder; memory is that of the weights in"
        " 16 bits."
    )


def _recipes_text(recipes: Sequence[dict[str, Any]]) -> str:
    rows = [
        (recipe["name"], " + ".join(recipe["backbones"]), f"{recipe['gigabytes']:g} GB", recipe["source"])
        for recipe in recipes
    ]
    return _table(("recipe", "backbones", "memory", "source"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def _system_text(facts: dict[str, Any]) -> str:
    lines = [f"{key}: {facts[key]}" for key in ("system", "cores", "threads")]
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in (facts["devices"] | facts["versions"]).items())])


def _all_taps_text(facts: dict[str, Any]) -> str:
    return _facts_text(facts, fine=())


def _facts_text(
    facts: dict[str, Any], fine: Sequence[str] = (".block.", ".increment", ".query", ".key", ".value")
) -> str:
    head = facts.get("head")
    if head and "taps" not in facts:
        lines = [
            f"a head: {head['family']}, {head['task'] or 'of a --task that its files do not say'} ({head['reason']})"
        ]
        return "\n  ".join([*lines, *filter(None, (f"use `{head['use']}`", head["timesteps"]))])
    lines = [f"{facts['backbone']}: {facts['kind']}, weights from {facts['weights']}"]
    lines += [f"  {name}: {count / 1e6:.2f} M parameters" for name, count in facts["parameters"].items()]
    recommended = facts["recommended"]
    lines.append(f"  used by default: taps {', '.join(recommended['taps'])}; {_pairs(recommended['sizing'])}")
    if facts["denoises"]:
        usual = asdict(Conditions(timestep=-1))  # many of them mean nothing to this model
        chosen = {name: value for name, value in recommended["conditions"].items() if value != usual[name]}
        lines.append(f"  conditions: {_pairs(chosen)}")
    if head:
        lines.append(f"  its U-Net's weights are those of a head, {head['family']}: use `{head['use']}`")
    taps = [tap for tap in facts["taps"] if not any(part in tap["name"] for part in fine)]
    rows = [(tap["name"], f"{tap['channels']:>8}", f"{tap['stride']:>6}", tap["module"]) for tap in taps]
    table = _table(("tap", "channels", "stride", "module"), rows)
    lines += ["", *(f"  {line}" for line in table.splitlines())]
    if len(taps) < len(facts["taps"]):
        lines.append(f"  ... and {len(facts['taps']) - len(taps)} finer ones: diffrep info {facts['backbone']} --all")
    return "\n".join(lines)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value!r}" for key, value in values.items())
