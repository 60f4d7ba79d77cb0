"""Pins the models that one call uses, so that all results of a call come from the same checkpoint."""

from types import TracebackType
from typing import Self

from mal_server.models.registry import ModelRegistry
from mal_server.models.served_model import ServedModel


class PinnedModels:
    """A context manager that holds each model from its first use in a call to the end of the call."""

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry
        self._pinned: dict[str, ServedModel] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for model in self._pinned.values():
            self._registry.release(model)
        self._pinned.clear()

    def get(self, name: str) -> ServedModel:
        """Returns the model of a name; "" is the default. Raises the errors of `ModelRegistry.get`."""
        # The default model is one entry under both of its names, even if it is replaced between two items.
        key = name or self._registry.default
        model = self._pinned.get(key)
        if model is None:
            model = self._pinned[key] = self._registry.acquire(key)
        return model
