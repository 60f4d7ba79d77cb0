"""Entry point of the nuclio function."""

from mal_client.integrations.cvat.nuclio import handler, init_context

__all__ = ["handler", "init_context"]
