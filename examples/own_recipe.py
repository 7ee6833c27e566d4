"""A recipe of one's own against one with a name, on rendered pairs: `python examples/own_recipe.py`."""

import numpy as np

from diffrep import Correspondence, ExtractConfig, Fusion, MatchConfig, Part, Recipe
from diffrep.recipes import Reading
from diffrep.scenes import held_out_pair, shared_keypoints

mine = Recipe(
    name="mine",
    readings=(Reading(backbone="tiny", extract=ExtractConfig(taps=("up.1",), timestep=50, ensemble=2)),),
    fusion=Fusion(parts=(Part(taps=("up.1",)),)),
    matching=MatchConfig(mode="pixel"),
)
for name in ("tiny", mine):
    correspondence, right, count = Correspondence(name), 0, 0
    for number in range(3):
        a, b = held_out_pair("car", number)
        points, truth = shared_keypoints(a, b)
        errors = np.linalg.norm(correspondence.match(a.image, b.image, points).points.numpy() - truth, axis=1)
        reach = 0.1 * max(b.box[2] - b.box[0], b.box[3] - b.box[1])
        right, count = right + int((errors <= reach).sum()), count + len(errors)
    print(f"{name if isinstance(name, str) else name.name}: {right} of {count} points within a tenth of the object")
