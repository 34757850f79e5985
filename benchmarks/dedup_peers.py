"""Other tools' duplicates: `PEERS/python benchmarks/dedup_peers.py METHOD WORK`.

Runs in an environment of its own (`pip install imagehash imagededup fastdup semhash`) and imports
nothing of ours. Reads WORK/images, writes WORK/peers/METHOD.npz: `left`, `right` (numbers of the
sorted files), `value` (distance of hashes, cosine of vectors) and `seconds`.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

#: Bits set in each number of 16 bits.
BITS = np.array([bin(number).count("1") for number in range(1 << 16)], np.uint8)
#: Beyond these a pair is not written.
MAX_DISTANCE, MIN_COSINE = 12, 0.8
#: fastdup's default is 2, and no picture can then have more copies than that.
NEIGHBOURS = 20


def near_hashes(hashes):
    """Pairs of (N,) uint64 that differ in few bits."""
    left, right, value = [], [], []
    words = hashes.view(np.uint16).reshape(-1, 4)
    for row in range(len(hashes) - 1):
        distance = BITS[words[row + 1 :] ^ words[row]].sum(axis=1)
        near = np.flatnonzero(distance <= MAX_DISTANCE)
        left.append(np.full(len(near), row))
        right.append(row + 1 + near)
        value.append(distance[near])
    return np.concatenate(left), np.concatenate(right), np.concatenate(value)


def packed(bits):
    return int("".join("1" if bit else "0" for bit in np.ravel(bits)), 2)


def imagehash(kind, files):
    import imagehash
    from PIL import Image

    hashes = []
    for file in files:
        with Image.open(file) as image:
            hashes.append(packed(getattr(imagehash, kind)(image).hash))
    return near_hashes(np.array(hashes, np.uint64))


def imagededup(kind, files):
    from imagededup import methods

    encoder = getattr(methods, kind)(verbose=False)
    hashes = [int(encoder.encode_image(image_file=str(file)), 16) for file in files]
    return near_hashes(np.array(hashes, np.uint64))


def fastdup(work, files):
    import fastdup

    folder = work / "fastdup"
    run = fastdup.create(work_dir=str(folder), input_dir=str(work / "images"))
    run.run(
        threshold=MIN_COSINE,
        nearest_neighbors_k=NEIGHBOURS,
        num_threads=2,
        overwrite=True,
        verbose=False,
    )
    table = run.similarity()
    numbers = {file.name: number for number, file in enumerate(files)}
    ends = [
        np.array([numbers[Path(name).name] for name in table[f"filename_{end}"]])
        for end in ("from", "to")
    ]
    return np.minimum(*ends), np.maximum(*ends), table["distance"].to_numpy()


def semhash(work, files):
    """Give it our vectors: its own encoders are downloaded, and read text."""
    from semhash import SemHash

    class Vectors:
        def encode(self, inputs, **_):
            raise NotImplementedError

    vectors = np.load(work / "vectors.npy").astype(np.float32)
    names = [file.name for file in files]
    numbers = {name: number for number, name in enumerate(names)}
    index = SemHash.from_embeddings(embeddings=vectors, records=names, model=Vectors())
    left, right, value = [], [], []
    for one in index.self_deduplicate(threshold=MIN_COSINE).filtered:
        for other, cosine in one.duplicates:
            left.append(numbers[one.record])
            right.append(numbers[other])
            value.append(cosine)
    return np.array(left), np.array(right), np.array(value)


METHODS = {
    "imagehash-phash": lambda _, files: imagehash("phash", files),
    "imagehash-dhash": lambda _, files: imagehash("dhash", files),
    "imagededup-phash": lambda _, files: imagededup("PHash", files),
    "imagededup-dhash": lambda _, files: imagededup("DHash", files),
    "fastdup": fastdup,
    "semhash": semhash,
}


def main():
    method, work = sys.argv[1], Path(sys.argv[2]).resolve()
    os.environ["SENTRY_OPT_OUT"] = "1"
    files = sorted(path for path in (work / "images").iterdir() if path.suffix != ".txt")
    begun = time.monotonic()
    left, right, value = METHODS[method](work, files)
    seconds = time.monotonic() - begun
    (work / "peers").mkdir(exist_ok=True)
    np.savez(work / "peers" / f"{method}.npz", left=left, right=right, value=value, seconds=seconds)


if __name__ == "__main__":
    main()
