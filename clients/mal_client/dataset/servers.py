"""Selects the servers of a job: those that are reachable, which must all give the same masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mal_client.dataset.provenance import provenance_of
from mal_client.errors import CallTimedOut, ServerUnavailable
from mal_client.transport.base import Transport
from mal_client.types import LabelOptions, ServerInfo
from mal_train.core.errors import ConfigError
from mal_train.core.fingerprint import differences


def reachable_servers(
    clients: Sequence[Transport], options: LabelOptions, on_notice: Callable[[str], None]
) -> list[tuple[Transport, ServerInfo]]:
    """Returns the reachable servers with what they serve under these options.

    Raises:
        ServerUnavailable, CallTimedOut: none is reachable.
        ConfigError: the servers differ in model or settings.
        InvalidRequest: a server does not serve what the options ask for.
    """
    servers: list[tuple[Transport, ServerInfo]] = []
    errors: list[ServerUnavailable | CallTimedOut] = []
    for client in clients:
        try:
            servers.append((client, client.server_info().for_options(options)))
        except (ServerUnavailable, CallTimedOut) as error:
            errors.append(error)
    if not servers:
        raise errors[0]
    for unreachable in errors:
        on_notice(f"{unreachable}; starting with {len(servers)} of {len(clients)} servers")
    _refuse_different(servers, options)
    return servers


def _refuse_different(servers: Sequence[tuple[Transport, ServerInfo]], options: LabelOptions) -> None:
    (first, first_info), *others = servers
    expected = provenance_of(first_info, options)
    for client, info in others:
        different = differences(provenance_of(info, options), expected)
        if different:
            raise ConfigError(
                f"{client.address}: differs from {first.address}: {'; '.join(different)}; the masks of one file must "
                "come from servers with the same checkpoint, version and precision"
            )
