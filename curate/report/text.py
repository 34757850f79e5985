"""How texts from outside and numbers are shown, on all pages and in the terminal."""

__all__ = ["clean_text", "tell_count", "tell_score", "tell_share"]


def clean_text(text: str, most: int | None = None) -> str:
    """Make control characters visible, and cut.

    A NUL, an escape or a mark that turns the writing direction round would not be seen, and would
    change how what stands beside it looks. Marks within right-to-left text are left alone.

    Parameters
    ----------
    text : str
    most : int, optional
        Characters to keep.
    """
    if most is not None and len(text) > most:
        text = f"{text[:most]} … ({len(text):,} characters)"
    return "".join(map(_show_character, text))


def _show_character(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0x80 <= code < 0xA0 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
        return f"[U+{code:04X}]"
    return "\ufffd" if 0xD800 <= code < 0xE000 else character


def tell_score(value: float, decimals: int = 3) -> str:
    """Return a number with so many decimals, or two digits of one that would be nothing then.

    Most kept samples are mismatched with a probability far below a thousandth: "0.000" for all of
    them would hide which are near the threshold.

    Parameters
    ----------
    value : float
    decimals : int
    """
    if value == 0:
        return "0"
    return f"{value:.{decimals}f}" if abs(value) >= 10**-decimals else f"{value:#.2g}"


def tell_count(number: int, what: str) -> str:
    """Return a number of things, whose name takes an s in the plural."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def tell_share(share: float, decimals: int = 1) -> str:
    """Return a share as percents; what is neither nothing nor everything does not read as if.

    Parameters
    ----------
    share : float
        In [0, 1].
    decimals : int
    """
    told, least = f"{share:.{decimals}%}", 10.0**-decimals
    if share > 0 and told == f"{0:.{decimals}%}":
        return f"<{least:.{decimals}f}%"
    if share < 1 and told == f"{1:.{decimals}%}":
        return f">{100 - least:.{decimals}f}%"
    return told
