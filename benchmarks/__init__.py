"""Benchmarks of curate on public data, and the scripts that build that data."""
