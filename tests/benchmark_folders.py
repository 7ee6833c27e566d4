"""Writes small data sets in the layouts in which the benchmarks are released."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, width: int, height: int, seed: int) -> None:
    """A smooth random picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(path)


def write_spair(root: Path, *, images: int = 3, split: str = "test") -> Path:
    """SPair-71k with two categories, `images` of each, and all ordered pairs."""
    root = root / "SPair-71k"
    number = 0
    for seed, category in enumerate(("cat", "bus")):
        random = np.random.default_rng(seed)
        notes = []
        for i in range(images):
            width, height = (64, 48) if i % 2 else (40, 56)
            name = f"2010_{seed}{i:05d}"
            write_image(root / "JPEGImages" / category / f"{name}.jpg", width, height, 10 * seed + i)
            shown = sorted({0, 1, 4, 5, *random.choice(8, 3).tolist()} - {i})
            kps = {
                str(k): [int(random.integers(width)), int(random.integers(height))] if k in shown else None
                for k in range(30)
            }
            note = {
                "filename": f"{name}.jpg", "category": category, "image_width": width, "image_height": height,
                "bndbox": [3, 4, width - 3, height - 4], "kps": kps, "azimuth_id": i,
            }  # fmt: skip
            _write_json(root / "ImageAnnotation" / category / f"{name}.json", note)
            notes.append(note)
        for a in notes:
            for b in notes:
                if a is b:
                    continue
                number += 1
                ids = [k for k in a["kps"] if a["kps"][k] and b["kps"][k]]
                stems = [Path(n["filename"]).stem for n in (a, b)]
                pair = {
                    "filename": f"{number:06d}-{stems[0]}-{stems[1]}:{category}", "category": category,
                    "src_imname": a["filename"], "trg_imname": b["filename"],
                    "src_imsize": [a["image_width"], a["image_height"], 3],
                    "trg_imsize": [b["image_width"], b["image_height"], 3],
                    "src_bndbox": a["bndbox"], "trg_bndbox": b["bndbox"],
                    "src_kps": [a["kps"][k] for k in ids], "trg_kps": [b["kps"][k] for k in ids],
                    "kps_ids": ids, "mirror": 0, "viewpoint_variation": 0, "scale_variation": 0,
                }  # fmt: skip
                _write_json(root / "PairAnnotation" / split / f"{pair['filename']}.json", pair)
    return root


def write_pf_pascal(root: Path) -> Path:
    """PF-PASCAL with three test pairs of two classes."""
    root = root / "PF-dataset-PASCAL"
    rows = ["source_image,target_image,class,XA,YA,XB,YB"]
    for i, category in enumerate((5, 5, 18)):
        paths = []
        for side in range(2):
            name = f"2009_{i}{side:05d}.jpg"
            write_image(root / "JPEGImages" / name, 60 - 10 * side, 44, 2 * i + side)
            paths.append(f"PF-dataset-PASCAL/JPEGImages/{name}")
        points = [";".join(f"{v + i:.4f}" for v in (5, 12.5, 30)) for _ in range(4)]
        rows.append(",".join([*paths, str(category), *points]))
    (root / "test_pairs_pf_pascal.csv").write_text("\n".join(rows) + "\n")
    return root


def write_pf_willow(root: Path) -> Path:
    """PF-WILLOW with two pairs of two categories."""
    root = root / "PF-dataset"
    axes = [f"{axis}{side}_{k}" for side in "AB" for axis in "XY" for k in range(10)]
    rows = [",".join(["source_image", "target_image", *axes])]
    for i, folder in enumerate(("car(G)", "duck(S)")):
        paths = []
        for side in range(2):
            write_image(root / folder / f"60{side:02d}.png", 50, 40, 7 * i + side)
            paths.append(f"PF-dataset/{folder}/60{side:02d}.png")
        rows.append(",".join([*paths, *(f"{3 * k + i}.5" for _ in range(4) for k in range(10))]))
    (root / "test_pairs_pf.csv").write_text("\n".join(rows) + "\n")
    return root


def write_ap10k(root: Path) -> Path:
    """AP-10K as GeoAware-SC arranges it: one family of one species, three images, all pairs."""
    root = root / "ap-10k"
    names = []
    for i in range(3):
        width, height = 60, 40 + 4 * i
        inside = f"Canidae/fox/{i:012d}"
        write_image(root / "JPEGImages" / f"{inside}.jpg", width, height, i)
        keypoints = [[5 + 3 * k, 6 + k, 0 if k == i + 5 else 2] for k in range(17)]
        note = {
            "keypoints": [v for k in keypoints for v in k], "bbox": [4, 5, 50, 30], "width": width,
            "height": height, "num_keypoints": 16,
        }  # fmt: skip
        _write_json(root / "ImageAnnotation" / f"{inside}.json", note)
        names.append(inside)
    for a in names:
        for b in names:
            if a != b:
                pair = {
                    f"{side}_json_path": f"data/ap-10k/ImageAnnotation/{n}.json" for side, n in (("src", a), ("trg", b))
                }
                file = f"{Path(a).name}-{Path(b).name}:fox.json"
                _write_json(root / "PairAnnotation" / "test" / file, pair)
    return root


def write_ap10k_release(root: Path, species: Mapping[tuple[str, str], int]) -> Path:
    """AP-10K as released: (family, species) -> how many images. One split of three files; the others repeat it."""
    root = root / "AP-10K"
    categories, images, animals = [], [], []
    for kind, ((family, name), count) in enumerate(species.items(), start=1):
        categories.append({"id": kind, "supercategory": family, "name": name})
        for _ in range(count):
            number = len(images) + 1
            file = f"{number:012d}.jpg"
            write_image(root / "data" / file, 40, 32, number)
            images.append({"id": number, "file_name": file, "width": 40, "height": 32})
            keypoints = [[2 * k, k + number % 5, 0 if k == number % 17 else 2] for k in range(17)]
            animals.append(
                {
                    "id": number, "image_id": number, "category_id": kind, "bbox": [1, 2, 36, 28], "iscrowd": 0,
                    "num_keypoints": 16, "keypoints": [v for k in keypoints for v in k],
                }
            )  # fmt: skip
    for split in (1, 2, 3):
        for k, part in enumerate(("train", "val", "test")):
            notes = {
                "categories": categories,
                "images": images[k::3],
                "annotations": [animal for animal in animals if (animal["image_id"] - 1) % 3 == k],
            }
            _write_json(root / "annotations" / f"ap10k-{part}-split{split}.json", notes)
    return root


def write_tss(root: Path) -> Path:
    """TSS with one pair in each of two subsets; the second image is the first moved by (4, 2) pixels."""
    root = root / "TSS_CVPR2016"
    for subset, folder in (("FG3DCar", "Car_01"), ("JODS", "plane_2_5")):
        inside = root / subset / folder
        write_image(inside / "image1.png", 48, 36, 3)
        with Image.open(inside / "image1.png") as image:
            moved = np.roll(np.asarray(image), (2, 4), axis=(0, 1))
        Image.fromarray(moved[:, :44]).save(inside / "image2.png")
        for k, (width, dx, dy) in {1: (48, 4, 2), 2: (44, -4, -2)}.items():
            flow = np.broadcast_to(np.array([dx, dy], "<f4"), (36, width, 2))
            (inside / f"flow{k}.flo").write_bytes(struct.pack("<fii", 202021.25, width, 36) + flow.tobytes())
            mask = np.zeros((36, width), np.uint8)
            mask[8:28, 10:34] = 255
            Image.fromarray(mask).save(inside / f"mask{k}.png")
    return root


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
