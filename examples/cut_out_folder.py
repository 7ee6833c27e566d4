"""The objects of all images of a folder, cut out: `python examples/cut_out_folder.py photos/ cutouts/`."""

import sys
from pathlib import Path

from diffrep import load_head, load_image
from diffrep.heads.segmentation import cut_out
from diffrep.images import find_images

folder, output = sys.argv[1], Path(sys.argv[2])
output.mkdir(parents=True, exist_ok=True)
head = load_head("tiny-segmentation")
for file in find_images([folder]):
    image = load_image(file)
    cut_out(image, head(image).mask).save(output / f"{file.stem}.png")
    print(output / f"{file.stem}.png")
