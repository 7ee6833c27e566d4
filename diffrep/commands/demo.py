"""``diffrep demo``: everything on bundled images, as one page with pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diffrep.files import check_writable


@dataclass(frozen=True)
class Demo:
    """Run everything on bundled images and write one page with pictures.

    Rendered pairs and real photographs are matched with diffusion features alone, with DINO features alone and
    with both fused; then come depth, normals, masks, search, probes, large pictures and maps. All of it is done by
    the models that are part of the package. Nothing is downloaded.
    """

    # folder that the page, index.html, goes into; or the page itself, a name that ends in .html
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("demo")
    recipe: str = "tiny"  # a recipe with one or two backbones

    def run(self) -> None:
        page_file = self.output if self.output.suffix == ".html" else self.output / "index.html"
        check_writable(page_file, (".html",))
        from diffrep.commands.demo_sections import build_page
        from diffrep.recipes import Correspondence

        build_page(Correspondence(self.recipe)).save(page_file)
        print(f"wrote {page_file.absolute()}: open it in a browser")
