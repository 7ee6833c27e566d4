"""Features kept on disk: sharded, memory-mapped, appendable; the layout is described in docs/store.md."""

from diffrep.store.extraction import BulkConfig, Extracted, extract_store
from diffrep.store.manifest import Keep, Manifest, StoreError, load_manifest, provenance
from diffrep.store.reader import Store, Vectors, open_store
from diffrep.store.shards import StoredImage
from diffrep.store.writer import StoreWriter, write_store

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
