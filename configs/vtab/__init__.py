"""Recipes of transfer to many small tasks, for `vizattn vtab run`."""
