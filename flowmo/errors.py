"""Errors that several parts raise."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was expected and the way out."""
