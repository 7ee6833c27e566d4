"""Metres, with some measured: `python examples/metric_depth.py photo.jpg 60,40,5.1 220,120,5.8 120,220,4.5`."""

import sys

import torch

from diffrep import load_head

image, *places = sys.argv[1:]
depth = load_head("tiny-depth")(image)
known = torch.zeros(depth.values.shape)  # metres; 0: not known
for place in places:
    x, y, metres = (float(n) for n in place.split(","))
    known[round(y), round(x)] = metres
metric = depth.align(known)
print(f"from {metric.values.min():.2f} to {metric.values.max():.2f} metres")
metric.save("metric.npy")
