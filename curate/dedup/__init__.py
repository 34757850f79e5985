"""Copies of a picture: exact, near, and the groups that they form."""
