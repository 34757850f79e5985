"""Getting images of untrusted URLs: which addresses may be reached, one fetch, one shard."""
