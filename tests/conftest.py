"""Fixtures that several test files use."""

from store_fixtures import module, store

__all__ = ["module", "store"]
