"""Weights of proxies as files: safetensors in, safetensors out."""

from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from curate.errors import StorageError

__all__ = ["dump_weights", "load_weights"]

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
