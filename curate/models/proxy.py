"""The proxy over frozen vectors, whole: two small heads trained contrastively.

Each modality: centre and rotate (fixed) -> two-layer perceptron beside a linear path -> unit
vector. The two towers of the encoder need share neither a space nor a width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from curate.models.weights import load_weights

__all__ = [
    "Heads",
    "HeadsShape",
    "chance_loss",
    "contrastive_loss",
    "embed_pairs",
    "load_heads",
]

Array = np.ndarray[Any, Any]

#: Rows per inference batch, always padded to this: a row's result must not depend on its shard.
_BATCH = 256

#: 1 / temperature, the range that CLIP allows (Radford et al. 2021, section 2.5).
_MAX_SCALE = 100.0
_FIRST_SCALE = 1 / 0.07


@dataclass(frozen=True)
class HeadsShape:
    """Widths of a proxy.

    Parameters
    ----------
    image_width, text_width : int
        D of the frozen vectors.
    image_front, text_front : int
        Directions kept of either modality.
    hidden : int
    width : int
        Of the joint space.
    dropout : float
    """

    image_width: int
    text_width: int
    image_front: int
    text_front: int
    hidden: int = 128
    width: int = 128
    dropout: float = 0.2


class _Head(nn.Module):
    """(B, D) -> (B, width), unit norm."""

    mean: Tensor
    front: Tensor

    def __init__(self, inputs: int, front: int, shape: HeadsShape) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("front", torch.zeros(inputs, front))
        self.wide = nn.Linear(front, shape.hidden)
        self.narrow = nn.Linear(shape.hidden, shape.width)
        self.linear = nn.Linear(front, shape.width, bias=False)
        self.dropout = nn.Dropout(shape.dropout)

    def whiten(self, vectors: Tensor) -> Tensor:
        """(B, D) -> (B, front)."""
        return (vectors - self.mean) @ self.front

    def project(self, white: Tensor) -> Tensor:
        """(B, front) -> (B, width)."""
        bent = self.narrow(self.dropout(functional.gelu(self.wide(white))))
        return functional.normalize(bent + self.linear(self.dropout(white)), dim=-1)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.project(self.whiten(vectors))


class Heads(nn.Module):
    """Two heads and a temperature.

    Parameters
    ----------
    shape : HeadsShape
    """

    def __init__(self, shape: HeadsShape) -> None:
        super().__init__()
        self.shape = shape
        self.image = _Head(shape.image_width, shape.image_front, shape)
        self.text = _Head(shape.text_width, shape.text_front, shape)
        self.log_scale = nn.Parameter(torch.tensor(_FIRST_SCALE).log())

    def scale(self) -> Tensor:
        """1 / temperature."""
        return self.log_scale.exp().clamp(max=_MAX_SCALE)

    def set_fronts(self, image: tuple[Array, Array], text: tuple[Array, Array]) -> None:
        """Fix centring and rotation: mean (D,) and directions (D, front) of either modality."""
        for head, (mean, front) in ((self.image, image), (self.text, text)):
            head.mean.copy_(torch.from_numpy(np.array(mean, np.float32)))
            head.front.copy_(torch.from_numpy(np.array(front, np.float32)))


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, alike: Tensor) -> Tensor:
    """Symmetric cross-entropy of every pair against the others of its batch.

    Parameters
    ----------
    image, text : (B, D) float32, unit norm
    scale : () float32
    alike : (B, B) bool
        Pairs that are not each other's negatives: one cluster, or equal captions.

    Returns
    -------
    () float32
        ln B at chance; lower is better.

    References
    ----------
    Radford et al., CLIP (arXiv:2103.00020), figure 3.
    """
    excused = alike & ~torch.eye(len(alike), dtype=torch.bool)
    logits = (scale * image @ text.T).masked_fill(excused, -torch.inf)
    target = torch.arange(len(logits))
    forth = functional.cross_entropy(logits, target)
    back = functional.cross_entropy(logits.T, target)
    return (forth + back) / 2


def chance_loss(alike: Tensor) -> float:
    """Return the contrastive loss of a batch in which all pairs look the same: ln B or less.

    Pairs that are not each other's negatives lower it.
    """
    return ((~alike).sum(1) + 1).log().mean().item()


def load_heads(data: bytes, shape: HeadsShape) -> Heads:
    """Read a committed proxy, ready for inference.

    Raises
    ------
    StorageError
        If the bytes are not the weights of such a proxy.
    """
    return load_weights(Heads(shape), data)


def embed_pairs(heads: Heads, image: Array, text: Array) -> tuple[Array, Array]:
    """Put pairs into a proxy's joint space.

    Parameters
    ----------
    image : (N, image_width) float16 or float32
    text : (N, text_width) float16 or float32

    Returns
    -------
    image, text : (N, width) float16, unit norm
    """
    return _embed(heads.image, image), _embed(heads.text, text)


def _embed(head: _Head, vectors: Array) -> Array:
    width = head.linear.out_features
    result = np.empty((len(vectors), width), np.float16)
    batch = np.zeros((_BATCH, vectors.shape[1]), np.float32)
    for start in range(0, len(vectors), _BATCH):
        rows = vectors[start : start + _BATCH]
        batch[: len(rows)] = rows
        batch[len(rows) :] = 0
        with torch.inference_mode():
            result[start : start + len(rows)] = head(torch.from_numpy(batch)).numpy()[: len(rows)]
    return result
