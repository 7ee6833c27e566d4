"""Print the lowest versions of the dependencies that pyproject.toml allows, as a list of constraints for pip."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    specification, _, marker = requirement.partition(";")
    if found := re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)", specification.strip()):
        print(f"{found[1]}=={found[2]}" + (f"; {marker.strip()}" if marker else ""))
    else:
        sys.exit(f"pyproject.toml: {requirement!r} has no lowest version: write NAME>=VERSION")
