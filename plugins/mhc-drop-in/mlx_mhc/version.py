"""Whose names these are."""

__version__ = "0.4.1"
