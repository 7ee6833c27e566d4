"""``diffrep app``: a page in the browser, on this machine alone."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diffrep.commands.options import DeviceOptions
from diffrep.settings import check_options


def check_port(port: int) -> None:
    """Refuse a port that something else serves.

    Raises:
        OSError: naming it.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise OSError(f"port {port} cannot be taken ({error.strerror}): name another, --port N") from None


@dataclass(frozen=True, kw_only=True)
class App(DeviceOptions):
    """Open a page to try everything by clicking: matches, depth, normals, masks, search, maps of collections.

    For example: diffrep app, or with a collection of yours: diffrep app --index photos.index --store photos.store

    Only this machine can reach the page. What is uploaded and painted lies in a temporary folder, which is removed at
    the end; no other file is served. Ctrl-C ends it.
    """

    index: Path | None = None  # made by `diffrep index`; else the examples are searched
    store: Path | None = None  # made by `diffrep extract`; else the map is of the examples
    recipe: str = "tiny"  # of matching, when the page opens
    port: int | None = None  # of the page; the first that is free from 7860 on where left out
    upload_mb: int = 20  # largest file that is taken, in megabytes
    open: Annotated[bool, tyro.conf.arg(name="open")] = False  # open the page in the browser

    def run(self) -> None:
        check_options(self, port="1..65535", upload_mb="1..")
        if self.port is not None:
            check_port(self.port)
        from diffrep.devices import resolve_device
        from diffrep.index import open_index
        from diffrep.recipes import recipe
        from diffrep.store import open_store

        device = str(resolve_device(self.device))
        recipe(self.recipe)  # what cannot be used is said before the page opens
        for path, opened in ((self.index, open_index), (self.store, open_store)):
            if path is not None:
                opened(path)
        with tempfile.TemporaryDirectory(prefix="diffrep-app-") as folder:
            # read when Gradio is loaded: where its files lie, and that it tells nobody that it runs
            os.environ.update(GRADIO_TEMP_DIR=str(Path(folder) / "files"), GRADIO_ANALYTICS_ENABLED="False")
            try:
                from diffrep.commands.app_page import LOOK, Rooms, build
            except ImportError as error:
                if error.name != "gradio":
                    raise
                raise ImportError("the page needs Gradio: pip install 'diffrep[app]'") from None
            page = build(Rooms(Path(folder), device, self.index, self.store), self.recipe)
            _, address, _ = page.launch(
                server_name="127.0.0.1",
                server_port=self.port,
                share=False,
                inbrowser=self.open,
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,
                max_file_size=f"{self.upload_mb}mb",
                ssr_mode=False,
                pwa=False,
                enable_monitoring=False,
                footer_links=[],
                **LOOK,
            )
            print(f"the page is at {address} until Ctrl-C", flush=True)
            try:
                threading.Event().wait()
            finally:
                page.close(verbose=False)
