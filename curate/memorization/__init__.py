"""Folds, mismatch, rarity: arrays in, arrays out."""
