"""Pretrained towers and proxies: the only room that imports torch."""

__all__ = ["OPEN_CLIP", "imports_of", "parse_encoder"]

#: Before the colon of an encoder's name.
OPEN_CLIP = "open_clip"


def parse_encoder(name: str) -> tuple[str, str, str]:
    """Split an encoder's name into family, model and weights.

    Raises
    ------
    ValueError
        If it is neither `offline` nor `open_clip:MODEL/PRETRAINED`.
    """
    if name == "offline":
        return "offline", "", ""
    family, _, rest = name.partition(":")
    model, _, weights = rest.partition("/")
    if family != OPEN_CLIP or not model or not weights:
        raise ValueError("`offline` or `open_clip:MODEL/PRETRAINED` (a tag, or a local checkpoint)")
    return family, model, weights


def imports_of(name: str) -> tuple[str, ...]:
    """Modules that an encoder needs and that take seconds to import, by its name."""
    if name == "offline":
        return ("timm", "transformers.models.bert.modeling_bert")
    return (OPEN_CLIP,)
