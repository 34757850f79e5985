"""Clean image–text data before a model is trained on it."""

__version__ = "0.1.0"
