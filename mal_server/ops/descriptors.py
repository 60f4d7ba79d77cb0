"""Raises the limit of file descriptors: every connection takes one, and the usual soft limit is 1024."""

import logging
import resource

log = logging.getLogger(__name__)

OWN_DESCRIPTORS = 256
"""Descriptors for all but connections: files, devices, libraries."""


def raise_descriptor_limit(max_connections: int) -> None:
    """Raises the soft limit to the hard one; warns if that is too low for the connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = max_connections + OWN_DESCRIPTORS
    if resource.RLIM_INFINITY != hard < needed:
        log.warning(
            "limit of file descriptors is %d; connections.max_connections: %d needs %d; raise it (ulimit -n, "
            "LimitNOFILE=) or lower connections.max_connections",
            hard,
            max_connections,
            needed,
        )
