"""How hard to filter: small models trained on what each setting of `select` would keep."""
