"""Parses YAML text within bounds. Every YAML file and value that the project reads passes through `parse_yaml`.

A settings file is data: it needs no aliases, which expand 300 bytes to gigabytes, and no tags. Both are refused, and so
are nested lists and mappings without end.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

MAX_DEPTH = 20
"""Lists and mappings within one another."""
MAX_NODES = 50_000
"""Values, names, lists and mappings of one text; each takes some 20 µs and a kilobyte."""
MAX_DIGITS = 40
"""Digits of a number; longer ones are text, as Python takes quadratic time for them."""


def parse_yaml(text: str) -> Any:
    """Parses one YAML document: `3`, `1e-4`, `true`, `[0.1, 0.2]`, `null`, a plain string, a mapping.

    Raises:
        yaml.YAMLError: not YAML, a field given twice, an alias, an anchor, a tag, or more than `MAX_DEPTH` or
            `MAX_NODES`. The message names the place, and repeats no text of the file.

    >>> parse_yaml("1e-4"), parse_yaml("[1, 2]"), parse_yaml("vit/16")
    (0.0001, [1, 2], 'vit/16')
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise yaml.YAMLError(f"{error.problem}{place}") from None
    except yaml.reader.ReaderError as error:
        raise yaml.YAMLError(f"character {error.character!r} is not allowed (position {error.position})") from None


class _Loader(yaml.SafeLoader):
    """YAML loader in which `1e-4` is a number, a date is text, and a duplicate field is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Returns the next node; raises ComposerError for one that settings may not have."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _refused("an alias or anchor (* or &) is not supported; write the value out", event)
        if event.tag is not None:
            raise _refused(f"the tag {event.tag[:80]} is not supported; remove it", event)
        self._nodes += 1
        self._depth += 1
        if self._depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise _refused(f"more than {MAX_DEPTH} levels or {MAX_NODES} values, which are the limits", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Returns the node as a dict; raises ConstructorError for a duplicate field."""
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            mark = key_node.start_mark
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a list or mapping is no name of a field", mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"field {str(key)[:80]!r} is given twice", mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refused(rule: str, event: Any) -> yaml.composer.ComposerError:
    return yaml.composer.ComposerError(None, None, rule, event.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)
# Without YAML 1.1's base 60, by which `1:30` is 90.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(
        rf"^[-+]?(?:0|[1-9][0-9_]{{0,{MAX_DIGITS - 1}}}|0b[01_]*[01]|0[0-7_]{{1,{MAX_DIGITS}}}"
        rf"|0x[0-9a-fA-F_]{{0,{MAX_DIGITS}}}[0-9a-fA-F])$"
    ),
    list("-+0123456789"),
)
