"""Clean image–text data before a model is trained on it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curate import audit, mitigation
    from curate.dataset import Samples

__all__ = ["audit", "load", "mitigation"]
__version__ = "0.1.0"


def load(out: str, **options: Any) -> "Samples":
    """Return what a finished run kept as a dataset for PyTorch's DataLoader.

    Parameters
    ----------
    out : str
        OUT of a finished run.
    **options
        Parameters of `curate.dataset.Samples`: `image`, `transform`, `weighted`, `seed`,
        `shuffle`, `buffer_samples`, `rank`, `world_size`.
    """
    # Imports torch, which takes seconds and which the command line can do without.
    from curate.dataset import Samples

    return Samples(out, **options)


def __getattr__(name: str) -> Any:
    # These import torch too: `curate.audit.Monitor` works, and `import curate` stays light.
    if name in ("audit", "mitigation"):
        return importlib.import_module(f"curate.{name}")
    raise AttributeError(f"module 'curate' has no attribute {name!r}")
