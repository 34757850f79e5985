from pathlib import Path

import numpy as np

from curate import formats
from curate.formats import npy
from curate.formats.sources import find_root
from tests.formats.vectors import draw_vectors


def test_vectors_without_a_word(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", draw_vectors(3))
    given = (str(tmp_path),)
    layout, (source,) = formats.list_sources(given, find_root(given))
    assert layout == "npy"
    rows = npy.scan(source).table.to_pylist()
    assert [(row["key"], row["row"]) for row in rows] == [("0", 0), ("1", 1), ("2", 2)]
    assert {(row["caption"], row["ingest_reason"]) for row in rows} == {(None, None)}
    assert npy.open_vectors(source).image.rows == 3
    # Beside images it is not what the folder is about.
    (tmp_path / "a.png").write_bytes(b"x")
    assert formats.list_sources(given, find_root(given))[0] == "folder"
