"""Places of one image in another: `python examples/match_points.py cat.jpg dog.jpg 212,130 240,131`."""

import sys

from diffrep import Correspondence

source, target, *points = sys.argv[1:]
matches = Correspondence("tiny").match(source, target, [[float(n) for n in point.split(",")] for point in points])
for point, place, score in zip(points, matches.points.tolist(), matches.scores.tolist(), strict=True):
    print(f"{point} -> {place[0]:.0f},{place[1]:.0f} (similarity {score:.2f})")
matches.save("matches.png")
