"""The list of kept samples, for those who filter their own copy of the data at load time."""

import pyarrow as pa

from curate.schema import select_schema

__all__ = ["NAME", "SCHEMA", "select_kept"]

NAME = "keep.parquet"
SCHEMA = select_schema(("uid", "key", "source_file", "weight"))


def select_kept(decisions: pa.Table) -> pa.Table:
    """Return the kept rows of decisions, with the list's columns."""
    return decisions.filter(decisions["keep"]).select(SCHEMA.names).cast(SCHEMA)
