"""Weights as files: those of proxies, and those that others trained."""

from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import nn

from curate.errors import ConfigError, InputError, StorageError

__all__ = ["dump_weights", "fit_weights", "load_weights", "read_weights"]

_M = TypeVar("_M", bound=nn.Module)


def dump_weights(model: nn.Module) -> bytes:
    """Return the weights as safetensors."""
    return save({name: value.contiguous().cpu() for name, value in model.state_dict().items()})


def load_weights(model: _M, data: bytes) -> _M:
    """Put into a model what `dump_weights` gave, and make it ready for inference.

    Raises
    ------
    StorageError
        If the bytes are not the weights of such a model.
    """
    try:
        model.load_state_dict(load(data))
    except (SafetensorError, RuntimeError) as error:
        raise StorageError(
            f"score: a proxy's file must hold its weights; {str(error).splitlines()[0]}. "
            "Remove the score folder and run again."
        ) from error
    return model.eval().requires_grad_(False)


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """Read somebody's state dict; nothing in the file is executed.

    Parameters
    ----------
    path : str
        safetensors, or what `torch.save` wrote of tensors and plain values alone. A `state_dict`
        within is taken out; the prefixes of DistributedDataParallel and of `torch.compile` are
        taken off.

    Raises
    ------
    InputError
        If the file is missing, no such file, or holds objects other than tensors and plain values.
    """
    try:
        if path.endswith(".safetensors"):
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        why = error.strerror or str(error)
        raise InputError(f"{path}: must be a checkpoint; {why}. Check the path.") from error
    except Exception as error:  # whatever bytes that are no checkpoint make a reader raise
        raise InputError(
            f"{path}: must hold tensors and plain values alone, as safetensors or torch.save; it "
            "is no such file, or holds objects that could run code. Save model.state_dict()."
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    tensors = {
        str(name): value
        for name, value in (found.items() if isinstance(found, dict) else ())
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise InputError(
            f"{path}: must hold a state dict; got no tensors. Save model.state_dict()."
        )
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def fit_weights(model: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Put weights into a model, every one of them.

    Parameters
    ----------
    model : nn.Module
    tensors : dict of str to Tensor
    where : str
        Begins the error.

    Raises
    ------
    ConfigError
        If names or shapes differ: the weights are of another architecture.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in tensors and not name.endswith("position_ids")]
    further = [name for name in tensors if name not in own and not name.endswith("position_ids")]
    other = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if missing or further or other:
        first = (other or missing or further)[0]
        shapes = [tuple(part[first].shape) if first in part else "none" for part in (own, tensors)]
        raise ConfigError(
            f"{where}; got those of another architecture: {len(other)} tensors of other shapes, "
            f"{len(missing)} missing, {len(further)} unknown ({first}: {shapes[1]} instead of "
            f"{shapes[0]}). Name the model that was trained."
        )
    model.load_state_dict({name: tensors[name] for name in own if name in tensors}, strict=False)
