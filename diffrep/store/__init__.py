"""Features kept on disk: sharded, memory-mapped, appendable; the layout is described in docs/store.md."""

from diffrep.store.extraction import BulkConfig, Extracted, extract_store
from diffrep.store.manifest import Manifest, StoreWriter, load_manifest, provenance, write_store
from diffrep.store.reader import Store, Vectors, open_store
from diffrep.store.shards import Keep, StoredImage, StoreError

__all__ = [
    "BulkConfig",
    "Extracted",
    "Keep",
    "Manifest",
    "Store",
    "StoreError",
    "StoreWriter",
    "StoredImage",
    "Vectors",
    "extract_store",
    "load_manifest",
    "open_store",
    "provenance",
    "write_store",
]
