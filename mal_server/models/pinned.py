"""The models that one call uses. What it found first it keeps, so that a switch of models never splits its answers."""

from types import TracebackType
from typing import Self

from mal_server.models.registry import ModelRegistry
from mal_server.models.served_model import ServedModel


class PinnedModels:
    """The models that one call uses: the same ones from first use to its end. A context manager."""

    def __init__(self, models: ModelRegistry) -> None:
        self._models = models
        self._held: dict[str, ServedModel] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for serving in self._held.values():
            self._models.give_back(serving)
        self._held.clear()

    def get(self, name: str) -> ServedModel:
        """The model of a name, "" = the default one. Errors as `ModelRegistry.current`."""
        asked = name or self._models.default  # one model under both, whatever is switched between two items
        known = self._held.get(asked)
        if known is None:
            known = self._held[asked] = self._models.take(asked)
        return known
