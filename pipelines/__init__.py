"""Pipelines that come with the package, found by name: `curate run offline`."""
