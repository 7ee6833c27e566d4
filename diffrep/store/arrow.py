"""A store as an Arrow table, without copying what Arrow can hold as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffrep.store.manifest import StoreError

if TYPE_CHECKING:
    from diffrep.store.reader import Store


def arrow_table(store: Store, tap: str) -> Any:
    """See `Store.table`."""
    try:
        import pyarrow as pa
    except ImportError:
        raise ImportError("a store as an Arrow table needs pyarrow: pip install pyarrow") from None
    shapes, batches = set(), []
    for numbers, tensors in store.batches(1 << 30):
        values = tensors[tap]
        repeat = values.shape[1] if store.kind == "points" else 1
        owners = [number for number in numbers for _ in range(repeat)]
        images = [store.files[number] for number in owners]
        sizes = [store[number].placement.image_size for number in numbers for _ in range(repeat)]
        columns: dict[str, Any] = {
            "image": pa.array([image.name for image in images]),
            "sha256": pa.array([image.sha256 for image in images]),
            "height": pa.array([height for height, _ in sizes], pa.int32()),
            "width": pa.array([width for _, width in sizes], pa.int32()),
        }
        if store.kind == "points":
            values = values.flatten(0, 1)
            points = tensors["points"].flatten(0, 1).numpy()
            columns |= {"x": pa.array(points[:, 0]), "y": pa.array(points[:, 1])}
        shapes.add(tuple(values.shape[1:]))
        if len(shapes) > 1:
            raise StoreError(f"{store.folder}: its maps differ in size, read them by image or by batch")
        columns["features"] = _features(values)
        batches.append(pa.table(columns))
    if not batches:
        raise StoreError(f"{store.folder} holds no images")
    return pa.concat_tables(batches)


def _features(values: Tensor) -> Any:
    import pyarrow as pa

    values = values.float() if values.dtype == torch.bfloat16 else values
    flat, size = pa.array(values.reshape(-1).numpy()), values[0].numel()
    lists = pa.FixedSizeListArray.from_arrays(flat, size)
    if values.ndim == 2:
        return lists
    kind = pa.fixed_shape_tensor(flat.type, tuple(values.shape[1:]))
    return pa.ExtensionArray.from_storage(kind, lists)
