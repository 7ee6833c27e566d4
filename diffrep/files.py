"""Writing files so that nothing is ever half there."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file; what was there is replaced only by a whole one. Its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def forget_origin(folder: Path) -> None:
    """Take out of the configurations in a model's folder where its parts were read from, which diffusers writes."""
    for path in sorted(folder.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
