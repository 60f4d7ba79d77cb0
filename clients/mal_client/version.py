"""Which version of the distribution this is."""

from importlib.metadata import PackageNotFoundError, version


def client_version() -> str:
    """Version of the installed distribution; "unknown" when it runs from a source folder that is not installed."""
    try:
        return version("mask-auto-labeler")
    except PackageNotFoundError:
        return "unknown"
