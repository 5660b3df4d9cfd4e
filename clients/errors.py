"""The one exception of this application: something in its configuration cannot work."""

__all__ = ["AppConfigError"]


class AppConfigError(ValueError):
    """A run-config or node-config value, or a file it points to, is missing or wrong."""
