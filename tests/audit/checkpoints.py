"""A tiny open_clip model, pairs of shapes to train it on, and the training."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from tests.support import write_tar

SIDE = 32
#: Small enough to learn a hundred pairs by heart in seconds.
TINY = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 48, "head_width": 24, "patch_size": 8},
    "text_cfg": {
        "context_length": 12, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 1,
    },
}  # fmt: skip
COLOURS = ("red", "green", "blue", "black", "white", "gold", "pink", "grey", "brown", "violet")
THINGS = ("cat", "dog", "bird", "fish", "tree", "car", "boat", "house", "chair", "lamp", "cup")
WORDS = (*COLOURS, *THINGS)

Pair = tuple[bytes, str]


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny-audit.json"
    path.write_text(json.dumps(TINY | changes))
    return path


def pairs(count: int, seed: int) -> list[Pair]:
    """Random drawings with captions of random words: nothing to learn but by heart."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        image = Image.new("RGB", (64, 64), tuple(rng.integers(0, 256, 3).tolist()))
        pen = ImageDraw.Draw(image)
        for _ in range(6):
            x, y, w, h = rng.integers(0, 48, 4).tolist()
            colour = tuple(rng.integers(0, 256, 3).tolist())
            (pen.ellipse, pen.rectangle)[int(rng.integers(2))](
                (x, y, x + 4 + w, y + 4 + h), fill=colour
            )
        data = io.BytesIO()
        image.save(data, "PNG")
        found.append((data.getvalue(), " ".join(rng.choice(WORDS, 5).tolist())))
    return found


def write_pairs(path: Path, given: list[Pair]) -> Path:
    members = []
    for number, (image, caption) in enumerate(given):
        members += [(f"{number:05d}.png", image), (f"{number:05d}.txt", caption.encode())]
    return write_tar(path, members)


def build(config: Path, seed: int = 0) -> tuple[Any, Any, Any]:
    """Model, image transform and tokenizer."""
    import open_clip

    open_clip.add_model_config(config)
    torch.manual_seed(seed)
    model, _, transform = open_clip.create_model_and_transforms(config.stem)
    return model, transform, open_clip.get_tokenizer(config.stem)


def prepare(given: list[Pair], transform: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    images = [transform(Image.open(io.BytesIO(data)).convert("RGB")) for data, _ in given]
    return {"image": torch.stack(images), "text": tokenizer([text for _, text in given])}


def train(model: Any, panel: dict[str, torch.Tensor], steps: int, rate: float = 1e-3) -> Any:
    from open_clip.loss import ClipLoss

    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=rate), ClipLoss()
    model.train()
    for _ in range(steps):
        rows = torch.randperm(len(panel["image"]))[:64]
        out = model(panel["image"][rows], panel["text"][rows])
        image, text, scale = out if isinstance(out, tuple) else tuple(out.values())[:3]
        optimizer.zero_grad()
        loss(image, text, scale).backward()
        optimizer.step()
    return model.eval()
