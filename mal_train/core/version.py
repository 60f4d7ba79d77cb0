"""Version of the installed distribution."""

from importlib import metadata

DISTRIBUTION = "mask-auto-labeler"


def distribution_version() -> str:
    """Returns the version of the installed distribution; "unknown" in a source folder that is not installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
