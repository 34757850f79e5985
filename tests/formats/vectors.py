"""Folders of embeddings as clip-retrieval and DataComp write them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Array = np.ndarray[Any, Any]


def draw_vectors(count: int, width: int = 24, seed: int = 0) -> Array:
    """(N, D) float16, unit norm: no two alike."""
    rows = np.random.default_rng(seed).standard_normal((count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write_part(
    folder: Path,
    part: str,
    images: Array,
    texts: Array | None = None,
    **columns: list[Any] | pa.Array,
) -> None:
    """Write one part of clip-retrieval's; without columns its metadata has paths alone."""
    paths = [f"{part}{row:04d}" for row in range(len(images))]
    table = pa.table({"image_path": paths, **columns})
    for name in ("img_emb", "metadata", *(() if texts is None else ("text_emb",))):
        (folder / name).mkdir(parents=True, exist_ok=True)
    np.save(folder / f"img_emb/img_emb_{part}.npy", images)
    if texts is not None:
        np.save(folder / f"text_emb/text_emb_{part}.npy", texts)
    pq.write_table(table, folder / f"metadata/metadata_{part}.parquet")


def datacomp_uids(count: int, start: int = 0) -> list[str]:
    return [f"{start + row:032x}" for row in range(count)]


def write_datacomp(folder: Path, stem: str, uids: list[str], **arrays: Array) -> None:
    """Write one file of CommonPool's metadata and its vectors."""
    folder.mkdir(parents=True, exist_ok=True)
    count = len(uids)
    table = pa.table(
        {
            "uid": uids,
            "url": [f"http://x/{row}" for row in range(count)],
            "text": [f"caption {uid[-4:]}" for uid in uids],
            "original_width": pa.array([640 + row for row in range(count)], pa.int64()),
            "original_height": pa.array([480] * count, pa.int64()),
            "clip_b32_similarity_score": pa.array([0.25] * count, pa.float32()),
            "clip_l14_similarity_score": pa.array([0.5] * count, pa.float32()),
            "face_bboxes": pa.array([[[0.1, 0.2, 0.3, 0.4]]] * count),
            "sha256": [f"{row:064x}" for row in range(count)],
        }
    )
    pq.write_table(table, folder / f"{stem}.parquet")
    np.savez(folder / f"{stem}.npz", **arrays)
