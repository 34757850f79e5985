"""The report's map: a random draw of pictures laid on a plane, like beside like."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate import storage
from curate.stages.base import Room
from curate.stages.score_inputs import unit

__all__ = ["MAPPED", "draw_map", "project", "read_vectors"]

Array = np.ndarray[Any, Any]

#: Samples on the map: what one core embeds in about five seconds.
MAPPED = 1200
#: About how many neighbours t-SNE keeps together, and how many are asked about afterwards.
_PERPLEXITY, _ASKED = 30.0, 5


def read_vectors(room: Room, uids: list[str]) -> dict[str, Array]:
    """Return image vectors (D,) of samples by uid, without those that have none."""
    found: dict[str, Array] = {}
    if not uids or not room.has("image_emb"):
        return found
    wanted = pa.array(uids, pa.string())
    for shard in room.shards():
        table = room.read(shard, ["image_emb"])
        hits = table.filter(pc.is_in(table["uid"], value_set=wanted))
        vectors, valid = storage.read_vectors(hits["image_emb"])
        valid &= np.isfinite(vectors).all(axis=1)
        names = np.array(hits["uid"].to_pylist(), object)
        found.update(zip(names[valid].tolist(), vectors[valid], strict=True))
    return found


def draw_map(vectors: dict[str, Array], uids: list[str]) -> dict[str, Any] | None:
    """Lay samples on a plane by their image vectors.

    Parameters
    ----------
    vectors : dict of str to (D,) floating
    uids : list of str
        Those without a vector are left out.

    Returns
    -------
    dict or None
        `points` (uid, across, down) and `trust`, see `project`; None for fewer than three vectors.
    """
    uids = [uid for uid in uids if uid in vectors]
    if len(uids) < 3 or len(vectors[uids[0]]) < 2:
        return None
    places, trust = project(np.stack([vectors[uid] for uid in uids]))
    points = [(uid, x, y) for uid, (x, y) in zip(uids, places.tolist(), strict=True)]
    return {"points": points, "trust": trust}


def project(vectors: Array) -> tuple[Array, float | None]:
    """Lay vectors on a plane by t-SNE, begun from their principal components.

    The same vectors give the same places on one machine whatever its threads; another machine's
    last digits, and with them its map, may differ.

    Parameters
    ----------
    vectors : (N, D) floating, N > 2, D > 1

    Returns
    -------
    places : (N, 2) float64, [0, 1]
    trust : float or None
        Trustworthiness over 5 neighbours, [0, 1]: 1 if neighbours on the plane are neighbours in
        space. None for fewer than 12 vectors.

    References
    ----------
    van der Maaten, Accelerating t-SNE using tree-based algorithms, JMLR 2014.
    Venna & Kaski, Neighborhood preservation in nonlinear projection methods, ICANN 2001.
    """
    from sklearn.manifold import TSNE, trustworthiness
    from threadpoolctl import threadpool_limits

    rows = unit(vectors)
    if not np.ptp(rows, axis=0).any():
        return np.full((len(rows), 2), 0.5), None
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    # Sums of several threads end in other digits each time, which a thousand steps enlarge.
    with threadpool_limits(1):
        method = TSNE(perplexity=perplexity, init="pca", random_state=0, n_jobs=1)
        places = method.fit_transform(rows).astype(np.float64)
        trust = None
        if len(rows) > 2 * _ASKED + 1:
            trust = round(float(trustworthiness(rows, places, n_neighbors=_ASKED)), 3)
    low, high = places.min(axis=0), places.max(axis=0)
    return np.round((places - low) / np.where(high > low, high - low, 1.0), 4), trust
