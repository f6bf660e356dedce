"""Activations at rest: the store, who writes it and who reads it."""

from raysae.activations.write import write_store

__all__ = ["write_store"]
