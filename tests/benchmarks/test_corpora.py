"""Tests of the corpora that benchmarks and the bundled sample are made of."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.corpora import BUNDLED_SAMPLE, SAMPLE_PAIRS, build, main
from benchmarks.images import Encoding, is_decodable, opened, over_white
from benchmarks.planting import KINDS, Shares, plan, swap_donors
from benchmarks.screening import choose_distinct, has_words
from benchmarks.shards import sample_key
from benchmarks.sources import Pair, normalise, openclipart_group, openclipart_pairs

Truth = dict[str, dict[str, str | None]]
Members = dict[str, dict[str, bytes]]

SHARES = Shares(
    swaps=0.2,
    exact_twins=0.1,
    near_twins=0.1,
    undecodable=0.1,
    truncated=0.1,
    empty_captions=0.1,
)
MAX_SAMPLE_BYTES = 6_000_000
MIN_SWAPS = 100
MIN_OTHERS = 36

SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:cc="http://web.resource.org/cc/"
 xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><metadata><rdf:RDF>
 <cc:Work><dc:title> Red  cat 02</dc:title><dc:description>HASH(0x85a831c)</dc:description>
 <dc:subject><rdf:Bag><rdf:li></rdf:li><rdf:li>animal</rdf:li><rdf:li>cat</rdf:li></rdf:Bag>
 </dc:subject><dc:creator><cc:Agent><dc:title>Someone</dc:title></cc:Agent></dc:creator>
 </cc:Work></rdf:RDF></metadata>"""


def make_image(seed: int, size: tuple[int, int], mode: str = "RGBA") -> bytes:
    """Return a PNG of smooth noise."""
    noise = Random(seed).randbytes(4 * 5 * 5)
    image = Image.frombytes("RGBA", (5, 5), noise).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def make_pairs(count: int = 60, size: tuple[int, int] = (60, 40)) -> list[Pair]:
    """Return pairs of which three at a time share a name group."""
    return [
        Pair(
            url=f"test:/things/{index:03d}.png",
            caption=f"Thing {index // 3}, Version {index % 3}",
            title=f"thing {index // 3}",
            name_group=f"thing {index // 3}",
            category="things",
            image=make_image(index, size),
        )
        for index in range(count)
    ]


def read_members(corpus: Path) -> Members:
    """Return the members of all tars by key and extension."""
    members: Members = {}
    for path in sorted((corpus / "shards").glob("*.tar")):
        with tarfile.open(path) as archive:
            for info in archive:
                key, _, extension = info.name.partition(".")
                content = archive.extractfile(info)
                assert content is not None
                assert info.mtime == 0
                members.setdefault(key, {})[extension] = content.read()
    return members


def read_truth(corpus: Path) -> Truth:
    """Return the truth by key."""
    rows = pq.read_table(corpus / "truth.parquet").to_pylist()
    return {row["key"]: row for row in rows}


def image_of(members: dict[str, bytes]) -> bytes:
    """Return a sample's image file."""
    (extension,) = set(members) - {"json", "txt"}
    return members[extension]


def digest(corpus: Path) -> dict[str, str]:
    """Return the hash of each file of a corpus."""
    return {
        path.relative_to(corpus).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(corpus.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a small corpus with every kind of defect."""
    output = tmp_path_factory.mktemp("corpus")
    build(make_pairs(), output, SHARES, Encoding(), seed=1, samples_per_shard=20)
    return output


def test_planted_counts() -> None:
    """Each kind has as many samples as its share tells, and twins come on top."""
    samples = plan(make_pairs(), SHARES, seed=0)
    counts = Counter(sample.kind for sample in samples)
    assert counts.pop("swap") == 12
    assert counts.pop("clean") == 60 - 12 - 3 * 6
    assert counts == dict.fromkeys(
        ("exact_twin", "near_twin", "undecodable", "truncated", "empty_caption"), 6
    )


def test_kinds_are_disjoint() -> None:
    """Twins have clean originals, and no original has two twins."""
    samples = plan(make_pairs(), SHARES, seed=0)
    twins = [sample for sample in samples if sample.kind.endswith("_twin")]
    originals = [sample.of for sample in twins]
    assert len(set(originals)) == len(twins)
    for twin in twins:
        assert twin.of is not None
        assert samples[twin.of].kind == "clean"
        assert samples[twin.of].pair is twin.pair


@pytest.mark.parametrize("seed", range(20))
def test_swaps_have_no_fixed_points(seed: int) -> None:
    """Swapped captions are a permutation that crosses name groups and changes texts."""
    pairs = make_pairs()
    # Two groups can share a caption, which then must not be swapped between them.
    pairs[0] = Pair("test:/x.png", "THING 19,  version 2", "x", "x", "things", b"")
    donors = swap_donors(pairs, range(0, 60, 2), Random(seed))
    assert sorted(donors) == sorted(donors.values())
    for receiver, donor in donors.items():
        assert pairs[receiver].name_group != pairs[donor].name_group
        assert normalise(pairs[receiver].caption) != normalise(pairs[donor].caption)


def test_impossible_swaps_are_refused() -> None:
    """Captions of one name group cannot be swapped among themselves."""
    with pytest.raises(ValueError, match="too alike"):
        swap_donors(make_pairs(3), range(3), Random(0))


@pytest.mark.parametrize("shares", [{"swaps": -0.1}, {"swaps": 0.6, "truncated": 0.6}])
def test_bad_shares_are_refused(shares: dict[str, float]) -> None:
    """Shares that cannot be disjoint are an error."""
    with pytest.raises(ValueError, match="shares"):
        Shares(**shares)


def test_same_seed_gives_same_bytes(corpus: Path, tmp_path: Path) -> None:
    """A corpus depends on its seed and on nothing else."""
    for name, seed in (("same", 1), ("other", 2)):
        build(make_pairs(), tmp_path / name, SHARES, Encoding(), seed, samples_per_shard=20)
    assert digest(tmp_path / "same") == digest(corpus)
    assert digest(tmp_path / "other") != digest(corpus)


def test_layout(corpus: Path) -> None:
    """Shards hold what img2dataset's do, and nothing tells the truth beside them."""
    shards = corpus / "shards"
    # 60 originals and 12 twins make four shards of at most 20 samples.
    expected = {f"{n:05d}{end}" for n in range(4) for end in (".tar", ".parquet", "_stats.json")}
    assert {path.name for path in shards.iterdir()} == expected
    assert {path.name for path in corpus.iterdir()} == {"shards", "truth.parquet"}
    members = read_members(corpus)
    for path in sorted(shards.glob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        stats = json.loads(path.with_name(f"{path.stem}_stats.json").read_text())
        assert stats["count"] == stats["successes"] == len(rows)
        for row in rows:
            files = members.pop(row["key"])
            assert json.loads(files["json"]) == row
            assert files["txt"].decode() == row["caption"]
            assert hashlib.sha256(image_of(files)).hexdigest() == row["sha256"]
            assert row["key"].startswith(path.stem)
    assert not members


def test_key_has_img2dataset_form() -> None:
    """Keys are the shard in five digits and the index in as many as it needs."""
    assert sample_key(0, 10_000) == "000000000"
    assert sample_key(10_003, 10_000) == "000010003"
    assert sample_key(2_007, 1_000) == "00002007"
    assert sample_key(257, 250) == "00001007"


def test_contents_match_truth(corpus: Path) -> None:
    """Every sample is spoilt as the truth tells, and only so."""
    members = read_members(corpus)
    truth = read_truth(corpus)
    originals = {f"things/{n:03d}.png": pair.read() for n, pair in enumerate(make_pairs())}
    assert members.keys() == truth.keys()
    for key, row in truth.items():
        data, caption = image_of(members[key]), members[key]["txt"].decode()
        original = originals[str(row["source"])]
        assert (data == original) == (row["kind"] not in ("near_twin", "undecodable", "truncated"))
        assert is_decodable(data) == (row["kind"] not in ("undecodable", "truncated"))
        if row["kind"] == "swap":
            assert caption == truth[str(row["of_key"])]["original_caption"]
            assert row["name_group"] != truth[str(row["of_key"])]["name_group"]
        else:
            assert caption == ("" if row["kind"] == "empty_caption" else row["original_caption"])
        if row["kind"] == "truncated":
            assert original.startswith(data)
            assert 0.29 < len(data) / len(original) <= 0.6


def test_near_twins(corpus: Path) -> None:
    """Near twins take turns in how they are altered, and say so."""
    members = read_members(corpus)
    twins = [row for row in read_truth(corpus).values() if row["kind"] == "near_twin"]
    assert Counter(row["transform"] for row in twins) == {"jpeg30": 2, "resize70": 2, "crop4": 2}
    sizes = {"jpeg30": (60, 40), "resize70": (42, 28), "crop4": (56, 36)}
    for row in twins:
        with opened(image_of(members[str(row["key"])])) as image:
            assert image.size == sizes[str(row["transform"])]
            assert image.format == ("JPEG" if row["transform"] == "jpeg30" else "PNG")


def test_large_images_are_halved(tmp_path: Path) -> None:
    """Images above 128 px keep half their size."""
    pairs = make_pairs(30, size=(200, 150))
    build(pairs, tmp_path, Shares(near_twins=0.2), Encoding())
    members = read_members(tmp_path)
    halves = [row for row in read_truth(tmp_path).values() if row["transform"] == "half"]
    assert len(halves) == 2
    for row in halves:
        with opened(image_of(members[str(row["key"])])) as image:
            assert image.size == (100, 75)


def test_longest_side(tmp_path: Path) -> None:
    """Re-encoded images are JPEG files of the wanted size that remember their own."""
    build(make_pairs(6, size=(900, 300)), tmp_path, Shares(), Encoding(longest_side=90))
    for files in read_members(tmp_path).values():
        row = json.loads(files["json"])
        assert (row["width"], row["height"]) == (90, 30)
        assert (row["original_width"], row["original_height"]) == (900, 300)
        with opened(files["jpg"]) as image:
            assert image.size == (90, 30)


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "P", "LA", "L"])
def test_small_images_are_never_enlarged(tmp_path: Path, mode: str) -> None:
    """Every mode that the packages use can be re-encoded."""
    pair = Pair("test:/x.png", "x", "x", "x", "x", make_image(0, (20, 10), mode))
    build([pair], tmp_path, Shares(near_twins=1), Encoding(longest_side=128))
    assert json.loads(read_members(tmp_path)["00000000"]["json"])["width"] == 20


def test_transparency_becomes_white() -> None:
    """What is transparent is white in images without transparency."""
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert over_white(clear).getpixel((0, 0)) == (255, 255, 255)


def test_existing_shards_are_kept(corpus: Path) -> None:
    """A corpus is never written over another."""
    before = digest(corpus)
    with pytest.raises(FileExistsError):
        build(make_pairs(), corpus, Shares(), Encoding())
    assert digest(corpus) == before


@pytest.mark.parametrize(
    ("title", "group"),
    [
        ("Elefante02", "elefante"),
        ("Clipart by Nicu Buculei - arrow08_4", "arrow"),
        ("Magnifying  Glass 3", "magnifying glass"),
        ("1984", "1984"),
        ("", "file name"),
    ],
)
def test_openclipart_group(title: str, group: str) -> None:
    """Numbers and authors do not make another name."""
    assert openclipart_group(title, "file_name_01") == group


def make_openclipart(root: Path) -> None:
    """Write a package folder with one good pair, one broken SVG and one lone PNG."""
    for kind in ("png", "svg"):
        (root / kind / "animals").mkdir(parents=True)
    for name in ("cat", "broken", "lone"):
        image = make_image(len(name), (30, 30))
        (root / "png" / "animals" / f"{name}.png").write_bytes(image)
    (root / "svg" / "animals" / "cat.svg").write_text(SVG, encoding="utf-8")
    (root / "svg" / "animals" / "broken.svg").write_text("<svg", encoding="utf-8")


def test_openclipart_pairs(tmp_path: Path) -> None:
    """Captions are title, description and tags, dirt included."""
    make_openclipart(tmp_path)
    broken, cat = openclipart_pairs(tmp_path)
    assert cat.caption == "Red cat 02. HASH(0x85a831c). animal, cat"
    assert (cat.name_group, cat.category) == ("red cat", "animals")
    assert (cat.url, cat.source) == ("openclipart:/animals/cat.png", "animals/cat.png")
    assert (broken.caption, broken.name_group) == ("", "broken")


def test_openclipart_command(tmp_path: Path) -> None:
    """The command line builds from a cached package and prints one JSON line."""
    make_openclipart(tmp_path / "cache" / "openclipart" / "usr" / "share" / "openclipart")
    arguments = ["openclipart", "--cache", f"{tmp_path}/cache", "--output", f"{tmp_path}/out"]
    result = CliRunner().invoke(main, [*arguments, "--truncated", "0.5"], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert report["originals"] == report["samples"] == 2
    assert report["kinds"]["truncated"] == 1
    assert report["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.*"))


def test_screening() -> None:
    """Near copies and titles without words are not chosen for the sample."""
    pairs = make_pairs(20)
    copies = [Pair("test:/copy.png", "copy", "copy", "copy", "x", pair.read()) for pair in pairs]
    wordless = [Pair("test:/y.png", "y", "HASH(0x85a831c)", "y", "x", make_image(99, (9, 9)))]
    chosen = choose_distinct(pairs + copies + wordless, 20, seed=0)
    assert len({pair.read() for pair in chosen}) == 20
    with pytest.raises(ValueError, match="only 20 of 21"):
        choose_distinct(pairs + copies + wordless, 21, seed=0)
    assert not has_words(pairs[0], Counter({"thing 0": 11}))


@pytest.fixture(scope="module")
def bundled() -> tuple[Truth, Members]:
    """Return the bundled sample's truth and members."""
    return read_truth(BUNDLED_SAMPLE), read_members(BUNDLED_SAMPLE)


def test_bundled_sample_is_small() -> None:
    """The bundled sample does not weigh the package down."""
    files = [BUNDLED_SAMPLE / "truth.parquet", *(BUNDLED_SAMPLE / "shards").iterdir()]
    assert sum(path.stat().st_size for path in files) <= MAX_SAMPLE_BYTES


def test_bundled_sample_counts(bundled: tuple[Truth, Members]) -> None:
    """The bundled sample holds enough of each kind, and truth and tars tell the same keys."""
    truth, members = bundled
    assert truth.keys() == members.keys()
    counts = Counter(str(row["kind"]) for row in truth.values())
    assert set(counts) == set(KINDS)
    assert counts["swap"] >= MIN_SWAPS
    assert min(counts[kind] for kind in KINDS) >= MIN_OTHERS
    assert len(truth) - counts["exact_twin"] - counts["near_twin"] == SAMPLE_PAIRS


def test_bundled_sample_is_as_told(bundled: tuple[Truth, Members]) -> None:
    """Each sample of the bundled sample is what its truth tells."""
    truth, members = bundled
    # Only planted twins repeat another sample's bytes.
    files = {image_of(sample) for sample in members.values()}
    assert len(files) == len(truth) - sum(row["kind"] == "exact_twin" for row in truth.values())
    for key, row in truth.items():
        kind, of_key = row["kind"], str(row["of_key"])
        data, caption = image_of(members[key]), members[key]["txt"].decode()
        assert is_decodable(data) == (kind not in ("undecodable", "truncated"))
        if kind == "exact_twin":
            assert image_of(members[of_key]) == data
        if kind == "swap":
            assert caption == truth[of_key]["original_caption"]
            assert normalise(caption) != normalise(str(row["original_caption"]))
            assert row["name_group"] != truth[of_key]["name_group"]
        else:
            assert caption == ("" if kind == "empty_caption" else row["original_caption"])
