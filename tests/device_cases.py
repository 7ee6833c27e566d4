"""What `test_cuda.py` runs on a device and on the CPU: small cases that give tensors, and the public calls they cover.

A case takes a `Place`. Its name says what it is; `covers` names the functions, methods and option classes whose
parameter ``device`` it sets, as `test_every_device_has_a_case` looks them up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import diffrep
from diffrep.backbones import Conditions, load_backbone, load_cleandift
from diffrep.backbones.pipelines import load_parts
from diffrep.devices import resolve_device
from diffrep.features import Descriptors, ExtractConfig
from diffrep.fusion import joint_pca
from diffrep.images import Sizing
from diffrep.matching import match_dense, match_points, mutual_matches
from diffrep.painting import diffusion_model
from diffrep.scenes import SceneSet, render_set
from diffrep.settings import MatchConfig
from diffrep.training.loop import FitSettings, fit

from .one_step_heads import random_head
from .probe_images import image_folder

SHORT = FitSettings(steps=4, warmup=0, bf16=False, learning_rate=1e-3, ema_decay=0.5)
SMALL = ExtractConfig(sizing=Sizing("squash", 64))


@dataclass(frozen=True)
class Place:
    """Where a case runs.

    Attributes:
        dtype: of networks that have a choice.
        folder: for what it writes, empty.
        shared: images, scenes and models that all cases read.
    """

    device: str
    dtype: torch.dtype
    folder: Path
    shared: Path

    @property
    def here(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype}

    @property
    def scenes(self) -> SceneSet:
        return SceneSet(self.shared / "scenes")

    @contextmanager
    def training(self) -> Iterator[None]:
        """Accelerate trains on one device a process: it forgets which."""
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        yield
        AcceleratorState._reset_state(reset_partial_state=True)


@dataclass(frozen=True)
class DeviceCase:
    """One case.

    Attributes:
        covers: dotted names below `diffrep`.
        half: whether its networks can run in bfloat16 too.
        bound: of the largest difference in float32, as a share of the largest value.
    """

    run: Callable[[Place], list[Tensor]]
    covers: tuple[str, ...]
    half: bool
    bound: float


CASES: dict[str, DeviceCase] = {}


def case(*covers: str, half: bool = False, bound: float = 1e-3) -> Callable[[Any], Any]:
    """Register a function as a case."""

    def register(run: Callable[[Place], list[Tensor]]) -> Callable[[Place], list[Tensor]]:
        CASES[run.__name__] = DeviceCase(run, covers, half, bound)
        return run

    return register


def share_data(folder: Path) -> Path:
    """What all cases read."""
    (folder / "images").mkdir()
    for number, picture in enumerate(images(4)):
        Image.fromarray(picture).save(folder / "images" / f"{number}.png")
    image_folder(folder / "colours", 6)
    render_set(folder / "scenes", "train", 6, size=64, workers=1, progress=False)
    for family in ("lotus-d", "marigold"):
        random_head(folder / family, family=family)
    return folder


def pixels(count: int = 2, side: int = 64) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def images(count: int = 2) -> list[np.ndarray]:
    return [(p.permute(1, 2, 0).numpy() * 255).astype(np.uint8) for p in pixels(count, 96)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(device: str, shift: float) -> Descriptors:
    places = torch.stack(torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij"), -1) + shift
    generator = torch.Generator().manual_seed(0)
    waves, phases = torch.randn(2, 64, generator=generator) * 0.3, torch.rand(64, generator=generator) * 6
    return Descriptors.from_vectors((places @ waves + phases).cos().to(device), (320, 384))


def bytes_of(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).float()


def last_loss(folder: Path) -> Tensor:
    """The mean loss of a short run: of all its steps, so that it shows what each of them did to the weights."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if "loss" in row])


# -- networks -------------------------------------------------------------------------------------------------------


def read_maps(backbone: Any, *taps: str, **conditions: Any) -> list[Tensor]:
    maps = backbone.maps(pixels(), list(taps), Conditions(**conditions))
    return [maps[tap] for tap in taps]


@case("backbones.loading.load_backbone", half=True)
def unet(place: Place) -> list[Tensor]:
    backbone = load_backbone("tiny", **place.here)
    return read_maps(backbone, "up.1", "mid", timestep=261, ensemble=2, posterior="sample")


@case(half=True)
def vit(place: Place) -> list[Tensor]:
    return read_maps(load_backbone("tiny-dino", **place.here), "layer.2", "layer.3.key")


@case("backbones.loading.load_cleandift", half=True)
def cleandift(place: Place) -> list[Tensor]:
    file = Path(diffrep.__file__).parent / "models/tiny/unet/diffusion_pytorch_model.safetensors"
    return read_maps(load_cleandift("tiny", file, **place.here), "up.1")


@case("backbones.pipelines.load_parts", "backbones.text.TextEncoders.__init__")
def parts(place: Place) -> list[Tensor]:
    loaded = load_parts("tiny", device=place.device)
    assert loaded.text is not None
    context = loaded.text.encode(["a red cup"])["a red cup"].context
    latents = loaded.vae.encode(pixels().to(place.device)).latent_dist.mean
    return [context, latents, loaded.vae.decode(latents).sample]


@case(half=True)
def features_of_files(place: Place) -> list[Tensor]:
    maps = diffrep.extract(load_backbone("tiny", **place.here), images(), SMALL, taps="up.1")
    return [maps["up.1"], maps.at("up.1", torch.tensor([[[30.0, 40.0], [90.5, 3.0]]] * 2))]


@case("features.FeatureMaps.to", "backbones.latent_diffusion.LatentDiffusion.to", "synthesis.model.SynthesisModel.to")
def moved(place: Place) -> list[Tensor]:
    """There and back and there again: what was computed once is computed again where the weights are."""
    backbone, model = load_backbone("tiny", device="cpu"), diffrep.load_synthesis(device="cpu")
    results: list[Tensor] = []
    for device in (place.device, "cpu", place.device):
        backbone.to(device, torch.float32)
        model.to(device, torch.float32)
        maps = diffrep.extract(backbone, images(), SMALL, taps="up.1")
        assert maps.to("cpu")["up.1"].device.type == "cpu"
        context = model.context(*(noise(2, dim).to(device) for dim in model.embedder.dims))
        with torch.no_grad():
            for _ in range(3):  # the last is a replay
                latents = model(noise(2, model.channels, 8, 8).to(device), 500, context)
        results += [maps.to(device)["up.1"], *read_maps(backbone, "up.1"), latents, model.decode(latents)]
    return results


@case("eval.restoration.FeatureDistance.__init__")
def feature_distance(place: Place) -> list[Tensor]:
    from diffrep.eval.restoration import FeatureDistance

    return [FeatureDistance(place.device)(pixels(), pixels().flip(-1))]


# -- matching -------------------------------------------------------------------------------------------------------


@case("devices.resolve_device")
def matches(place: Place) -> list[Tensor]:
    source, target = (smooth(str(resolve_device(place.device)), shift) for shift in (0.0, 0.4))
    points = torch.tensor([[30.0, 40.0], [200.5, 111.0], [380.0, 300.0]])
    results: list[Tensor] = []
    for mode in ("cell", "pixel", "soft"):
        one = match_points(source, target, points, MatchConfig(mode=mode, mutual=mode == "cell"))
        results += [one.points, one.scores]
    for metric in ("euclidean", "manhattan"):
        results.append(match_points(source, target, points, MatchConfig(metric=metric)).scores)
    dense = match_dense(source, target, MatchConfig(mutual=True))
    sources, mutual = mutual_matches(source, target)
    assert dense.mutual is not None
    order = (sources[:, 1] * 1000 + sources[:, 0]).argsort()  # scores that nearly agree may change places
    return [*results, dense.points, dense.scores, dense.mutual.float(), sources[order], mutual.points[order]]


@case()
def joint_pca_of_a_pair(place: Place) -> list[Tensor]:
    maps = [smooth(place.device, shift).parts[0].movedim(-1, 0) for shift in (0.0, 3.0)]
    drawn = [m.flatten(1) for m in joint_pca(maps, 4, generator=torch.Generator().manual_seed(1))]
    return [*joint_pca(maps, 4), drawn[0].T @ drawn[1]]  # directions that are drawn have no fixed signs


@case("recipes.Correspondence.__init__", "recipes.with_backbones")
def correspondence(place: Place) -> list[Tensor]:
    machine = diffrep.Correspondence("tiny", device=place.device, dtype=torch.float32, diffusion="tiny")
    one, two = machine.describe(*images())
    return [*one.parts, *two.parts, machine.match(*images(), [[30, 40], [70, 20]]).scores]


@case("tasks.pipeline")
def pipelines(place: Place) -> list[Tensor]:
    depth, features = (diffrep.pipeline(task, **place.here) for task in ("depth", "features"))
    return [depth(images()[0]).values, features(images()[:1]).at("up.2.resnet.0", [[(30, 40)]])]


@case()
def swapped(place: Place) -> list[Tensor]:
    from diffrep.swap import RefineConfig, swap_colours

    pose, appearance = (smooth(place.device, shift) for shift in (0.0, 0.4))
    backbone = load_backbone("tiny", device=place.device, dtype=torch.float32)
    refined = diffrep.refine(Image.fromarray(images()[0]), backbone, RefineConfig(steps=2))
    return [swap_colours(pose, appearance, pixels(1)[0].to(place.device), (40, 48)), bytes_of(refined) / 255]


# -- heads ----------------------------------------------------------------------------------------------------------


@case("heads.loading.load_head", half=True)
def heads(place: Place) -> list[Tensor]:
    depth, normals = (diffrep.load_head(f"tiny-{task}", **place.here)(images()) for task in ("depth", "normals"))
    masks = diffrep.load_head("tiny-segmentation", **place.here)(images(), edges=True)
    return [torch.stack([getattr(one, part) for one in results]) for results, part in
            ((depth, "values"), (normals, "values"), (masks, "mask"), (masks, "edge"))]  # fmt: skip


@case(half=True, bound=5e-3)  # whole levels of 255
def restored(place: Place) -> list[Tensor]:
    result = diffrep.load_head("tiny-restore", **place.here).predict(images()[0])
    return [bytes_of(result.pixels)]


@case("heads.diffdis.branch_vectors")
def branches(place: Place) -> list[Tensor]:
    from diffrep.heads.diffdis import branch_vectors

    return [branch_vectors(2, place.device)]


@case(bound=5e-3)  # gradients through decoder and U-Net, five times
def completed(place: Place) -> list[Tensor]:
    from diffrep.heads.completion import CompletionConfig, complete_depth

    known = torch.zeros(96, 96)
    known[::9, ::9] = torch.linspace(2, 5, 11)
    values = []
    for family in ("lotus-d", "marigold"):
        head = diffrep.load_head(place.shared / family, device=place.device, dtype=torch.float32)
        how = CompletionConfig(steps=2, rounds=3)
        values.append(complete_depth(head, Image.fromarray(images()[0]), known, how=how).values)
    return values


# -- probes ---------------------------------------------------------------------------------------------------------


def read_probe_data(place: Place, backbone: Any, *taps: str) -> Any:
    from diffrep.heads.probes import ProbeData, ReadPlan, read_labelled

    plan = ReadPlan(backbone.name, taps, None, (1, 2), SMALL)
    data = read_labelled(place.shared / "colours")
    return ProbeData.read(data, {backbone.name: backbone}, [plan], place.folder / "cache", progress=False)


@case(
    "heads.probes.probe.SavedProbe.predict", "heads.probes.probe.SavedProbe.usable", "heads.probes.probe.load_named",
    "heads.probes.probe.ClassProbe.predict", "heads.probes.probe.load_recorded",
)  # fmt: skip
def probe_of_images(place: Place) -> list[Tensor]:
    from diffrep.heads.probes import Cell, GridSettings, ProbeFit, ProbeRecipe, load_probe, train_probe

    data = read_probe_data(place, load_backbone("tiny-dino", device=place.device, dtype=torch.float32), "layer.2")
    fits = {"linear": ProbeFit(grid=GridSettings(epochs=3)), "mlp": ProbeFit(recipe=ProbeRecipe(epochs=2))}
    answers = []
    for kind, settings in fits.items():
        result = train_probe(data, data.layout(kind, [Cell("tiny-dino", 0, "layer.2", 2)]), settings)
        result.probe.save(place.folder / kind)
        files = sorted((place.shared / "colours").rglob("*.png"))[::5]
        answers += [result.scores, load_probe(place.folder / kind).predict(files, device=place.device).probabilities]
    return answers


@case(
    "heads.probes.probe.MapProbe.predict", "heads.probes.probe.MapProbe.predict_each",
    "heads.probes.pixels.PixelProbe.segment", bound=5e-3,
)  # fmt: skip
def probes_of_pixels(place: Place) -> list[Tensor]:
    from diffrep.heads.maps import DepthMap, save_map
    from diffrep.heads.probes import DenseSettings, PixelSettings, train_dense_probe, train_pixel_probe
    from diffrep.heads.probes.annotated import pair_annotations

    backbone, (first, second) = load_backbone("tiny", device=place.device, dtype=torch.float32), images()
    labels = (torch.arange(96) > 40).long().expand(96, 96)
    settings, options = PixelSettings(members=2, epochs=1), {"taps": ["conv_in"], "timesteps": (50,)}
    pixel = train_pixel_probe(
        [(first, labels)], ("left", "right"), backbone, settings=settings, extract=SMALL, **options  # type: ignore[arg-type]
    )  # fmt: skip
    depths = place.folder / "depths"
    depths.mkdir()
    for number in range(4):
        values = torch.linspace(2, 8, 96).expand(96, 96) + number
        save_map(depths / f"{number}.png", DepthMap(values.contiguous(), "depth", metric=True))
    dense = train_dense_probe(
        pair_annotations(place.shared / "images", depths), "depth", backbone, place.folder / "work",
        settings=DenseSettings(epochs=2, batch_size=2), extract=replace(SMALL, taps=("conv_in",)), progress=False,
    )  # fmt: skip
    (depth,) = dense.predict([second], device=place.device)
    # of the entropy of two classes, which is the largest that a divergence can be
    divergence = pixel.segment(second, device=place.device).divergence.flatten()
    return [torch.cat([divergence, torch.tensor([math.log(2)])]), depth.values]


# -- collections ----------------------------------------------------------------------------------------------------


@case("store.extraction.extract_store", half=True)
def store(place: Place) -> list[Tensor]:
    from diffrep.store import BulkConfig, Keep, extract_store, open_store

    for kind in ("pooled", "maps"):
        where = place.folder / kind
        bulk = BulkConfig(workers=0)
        extract_store([place.shared / "images"], where, "tiny-dino", SMALL, Keep(kind=kind), bulk, **place.here)
    stores = [open_store(place.folder / kind) for kind in ("pooled", "maps")]
    return [torch.stack([one[number].features[one.taps[0]] for number in range(len(one))]) for one in stores]


@case("index.query.search_folder", "index.query.query_image")
def search(place: Place) -> list[Tensor]:
    from diffrep.index import query_image, search_folder
    from diffrep.store import BulkConfig

    image = place.shared / "images/2.png"
    places = search_folder(
        place.shared / "images", image, point=(30, 40), backbone="tiny-dino", config=SMALL,
        bulk=BulkConfig(workers=0), work=place.folder, device=place.device, dtype=torch.float32,
    )  # fmt: skip
    hits = [places.hits, query_image(places.index, image, point=(70, 20), device=place.device)]
    return [torch.tensor([(hit.score, *hit.place.point) for hit in some]) for some in hits]


@case()
def exact_index(place: Place) -> list[Tensor]:
    from diffrep.index import TorchIndex, nearest
    from diffrep.index import search as search_index

    gallery, queries = (noise(count, 24, seed=count).to(place.device) for count in (300, 7))
    neighbours = search_index(TorchIndex(gallery), queries, 5)
    return [neighbours.indices.float(), neighbours.scores, nearest(queries, gallery).indices.float()]


# -- diffusion ------------------------------------------------------------------------------------------------------


@case("painting.sample", "painting.load_model", half=True)
def painted(place: Place) -> list[Tensor]:
    return [diffrep.sample("tiny", "a red cup", steps=4, seed=1, **place.here).images]


@case("painting.diffusion_model", "painting.DiffusionModel")
def samplers(place: Place) -> list[Tensor]:
    from diffrep.sampling.samplers import SAMPLERS

    model = diffusion_model("tiny", "a red cup", guidance=1.0, device=place.device)
    assert model.device.type == resolve_device(place.device).type
    names = [name for name, sampler in SAMPLERS.items() if sampler.table]
    return [diffrep.sample(model, sampler=name, steps=3, size=(32, 32), spacing="leading").latents for name in names]


@case("table_scheduler.TableScheduler.set_timesteps")
def scheduler(place: Place) -> list[Tensor]:
    from diffrep.table_scheduler import TableScheduler

    table = TableScheduler.from_config({"beta_schedule": "scaled_linear", "beta_start": 8e-4, "beta_end": 0.012})
    table.set_timesteps(5, device=place.device)
    x = noise(2, 4, 8, 8).to(place.device)
    for t in table.timesteps:
        x = table.step(0.3 * x, t, x).prev_sample
    return [table.timesteps.float(), x]


@case("eval.samplers.guided_models")
def guided(place: Place) -> list[Tensor]:
    from diffrep.eval.samplers import guided_models

    models = guided_models("tiny", 3.0, prompts=("a cat",), device=place.device)
    return [diffrep.sample(model, steps=2, size=(32, 32)).latents for model in models.values()]


@case("eval.likelihood.image_likelihood")
def likelihood(place: Place) -> list[Tensor]:
    from diffrep.eval.likelihood import image_likelihood

    files = [place.shared / "images/0.png"]
    ((file, bits),) = image_likelihood(files, size=32, tolerance=0.05, device=place.device)
    assert file == files[0]
    return [torch.tensor(bits)]


@case(bound=1e-2)  # samplers that amplify what gradients through decoder and U-Net round
def posteriors(place: Place) -> list[Tensor]:
    from diffrep.eval.guidance import MEASUREMENTS, METHODS, restore
    from diffrep.sampling.schedules import TimeGrid, table_times

    model = diffusion_model("tiny", "", guidance=1.0, device=place.device)
    times = [*table_times(model.schedule, 3, "leading"), -1]  # type: ignore[arg-type]
    grid = TimeGrid.of(model.schedule, times).ending()
    operator = next(iter(MEASUREMENTS.values()))((3, 64, 64))
    y = operator(2 * pixels(1) - 1)
    return [restore(method, model, operator, y, grid, weight=weights[0])[0] for method, (_, weights) in METHODS.items()]


@case()
def inversions(place: Place) -> list[Tensor]:
    from diffrep.guidance import inversion

    model = diffusion_model("tiny", "", guidance=1.0, device=place.device)
    grid = inversion.leading_grid(model.schedule, 3)  # type: ignore[arg-type]

    def network(x: Tensor, t: float) -> Tensor:
        return model.predict(x, t, slice(0, 1))

    x, results = model.encode(pixels(1).to(place.device)).float(), list[Tensor]()
    for method in ("ddim", "bdia", "edict"):
        with torch.no_grad():
            states = inversion.invert(network, x, grid, method)
            results += [*states[-1], *inversion.regenerate(network, states[-1], grid, method)]
    return results


@case(
    "synthesis.model.load_synthesis", "synthesis.grids.ImageEncoder.load", "synthesis.grids.ImageEncoder.of_model",
    half=True, bound=5e-3,  # whole levels of 255
)  # fmt: skip
def synthesis(place: Place) -> list[Tensor]:
    from diffrep.synthesis import EmbeddingGrid, SynthesisSettings
    from diffrep.synthesis.grids import ImageEncoder

    model = diffrep.load_synthesis(**place.here)
    encoders = ImageEncoder.of_model(model, device=place.device), ImageEncoder.load("tiny-dino", device=place.device)
    embeddings = [encoder(pixels(2, 128)).float().cpu() for encoder in encoders]
    side = model.window * model.factor
    grid, settings = EmbeddingGrid(embeddings[0][None]), SynthesisSettings(steps=3, seed=1)
    return [*embeddings, bytes_of(diffrep.synthesize(model, grid, (side, side + 32), settings))]


# -- trainings ------------------------------------------------------------------------------------------------------


@case("training.loop.fit", "training.loop.accelerator_of")
def plain_training(place: Place) -> list[Tensor]:
    network = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    for number, parameter in enumerate(network.parameters()):
        nn.init.zeros_(parameter).data.add_(0.3 * noise(*parameter.shape, seed=number))

    def batches(source: torch.Generator) -> dict[str, Tensor]:
        return {"x": torch.randn(16, 4, generator=source)}

    def loss(module: nn.Module, average: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"loss": (module(batch["x"]) - batch["x"][:, :2] * batch["x"][:, 2:]).square().mean()}

    with place.training():
        average = fit(network, batches, loss, SHORT, place.folder, device=place.device, progress=False)
    return [last_loss(place.folder), *average.parameters()]


def trained_head(training: Any, data: Any, place: Place) -> list[Tensor]:
    from diffrep.heads.training.fit import train_head

    with place.training():
        train_head(training, data, place.folder, device=place.device, progress=False)
    return [last_loss(place.folder)]


@case("heads.training.fit.train_head")
def depth_training(place: Place) -> list[Tensor]:
    from diffrep.heads.families import LOTUS_D
    from diffrep.heads.training.dense_data import SceneSamples
    from diffrep.heads.training.fit import OneStepTraining

    recipe = replace(LOTUS_D, posterior="mean", preserve=0.0)
    training = OneStepTraining(recipe=recipe, fit=SHORT, batch_size=2)
    return trained_head(training, ([SceneSamples(place.scenes, "disparity")], [1.0]), place)


@case(bound=1e-2)  # Adam's first steps are as large for a gradient that is nothing but rounding
def depth_training_with_a_decoder(place: Place) -> list[Tensor]:
    from diffrep.heads.training.dense_data import SceneSamples
    from diffrep.heads.training.fit import OneStepTraining

    training = OneStepTraining(fit=SHORT, batch_size=2, decoder=True)
    return trained_head(training, ([SceneSamples(place.scenes, "disparity")], [1.0]), place)


@case("heads.training.masks.held_scenes")
def segmentation_training(place: Place) -> list[Tensor]:
    from diffrep.heads.training.fit import SegmentationTraining

    return trained_head(SegmentationTraining(fit=SHORT, batch_size=2, size=64), place.scenes, place)


@case()
def restoration_training(place: Place) -> list[Tensor]:
    from diffrep.heads.training.restoration import PairSettings, RestorationTraining, scene_originals

    pairs = PairSettings(degradation="s3diff", versions=1)
    training = RestorationTraining(fit=SHORT, batch_size=2, size=64, pairs=pairs, workers=1)
    return trained_head(training, scene_originals(place.scenes), place)


@case("heads.training.detail.train_decoder")
def decoder_training(place: Place) -> list[Tensor]:
    from diffrep.heads.decoder import DetailDecoder
    from diffrep.heads.one_step import LatentCodec
    from diffrep.heads.training.detail import train_decoder

    head = diffrep.load_head(place.shared / "lotus-d", device=place.device, dtype=torch.float32)
    decoder = DetailDecoder.seeded(1, LatentCodec(load_parts("tiny").vae), widths=(16, 8, 8), outputs=1, coarse=True)
    with place.training():
        train_decoder(
            head, decoder, place.scenes, SHORT, place.folder, batch_size=2, device=place.device, progress=False
        )
    return [last_loss(place.folder)]


@case("training.synthesis.train_synthesis", "training.synthesis.smooth_decoder")
def synthesis_training(place: Place) -> list[Tensor]:
    from diffrep.training.patches import ScenePatches
    from diffrep.training.synthesis import SynthesisTraining, smooth_decoder, train_synthesis

    training, patches = SynthesisTraining(fit=SHORT, batch_size=2, held_out=2), ScenePatches(place.scenes)
    run, smoothing = place.folder / "run", place.folder / "decoder"
    with place.training():
        model = train_synthesis(training, patches, run, device=place.device, progress=False)
        latents = noise(2, model.channels, model.window, model.window)
        options: dict[str, Any] = {"batch_size": 2, "device": place.device, "progress": False}
        smooth_decoder(model, patches, latents, smoothing, SHORT, **options)
    return [last_loss(run), last_loss(smoothing)]


@case("training.consistency.train_few_step")
def few_step_training(place: Place) -> list[Tensor]:
    from diffrep.training.consistency import FewStepTraining, train_few_step
    from diffrep.training.patches import ScenePatches

    with place.training():
        training, patches = FewStepTraining(batch_size=2, fit=SHORT), ScenePatches(place.scenes)
        train_few_step(training, patches, place.folder, device=place.device, progress=False)
    return [last_loss(place.folder)]


@case("training.early_exit.train_early_exit")
def early_exit_training(place: Place) -> list[Tensor]:
    from diffrep.training.early_exit import EarlyExitTraining, train_early_exit
    from diffrep.training.patches import ScenePatches

    training = EarlyExitTraining(width=32, blocks=3, heads=2, held_out=2, batch_size=2, fit=SHORT)
    with place.training():
        train_early_exit(training, ScenePatches(place.scenes), place.folder, device=place.device, progress=False)
    return [last_loss(place.folder)]


# -- embeddings -----------------------------------------------------------------------------------------------------


def distances(embedding: Any) -> Tensor:
    """A map may be turned and mirrored."""
    return torch.cdist(*2 * (torch.as_tensor(embedding).double(),))


@case("manifold.geodesics.GeodesicSettings", "manifold.files.EmbedConfig", "manifold.heat.chebyshev_heat")
def embeddings(place: Place) -> list[Tensor]:
    from diffrep.manifold import EmbedConfig, alpha_decay_graph, embed_file, laplacian
    from diffrep.manifold.heat import chebyshev_heat

    points = noise(300, 6).numpy().astype(np.float64)
    fitted = diffrep.HeatGeodesicEmbedding(device=place.device, random_state=0).fit_transform(points)
    np.save(place.folder / "points.npy", points)
    embedded = embed_file(place.folder / "points.npy", config=EmbedConfig(device=place.device))
    graph = alpha_decay_graph(distances(points).numpy())
    heat = chebyshev_heat(laplacian(graph), np.eye(300)[:, :5], [1.0, 3.0], device=place.device)
    return [distances(fitted), distances(embedded.embedding), torch.from_numpy(heat)]
