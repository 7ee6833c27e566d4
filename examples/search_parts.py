"""Where in a folder is this part? `python examples/search_parts.py photos/ cat.jpg 120,80`."""

import sys

from diffrep.index import search_folder

folder, image, point = sys.argv[1:]
x, y = (float(n) for n in point.split(","))
for hit in search_folder(folder, image, point=(x, y), k=5).hits:
    print(hit.document())
