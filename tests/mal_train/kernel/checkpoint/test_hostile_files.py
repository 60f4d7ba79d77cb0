"""Damaged and forged checkpoints and settings: each gives a result or one clear error, in bounded time and memory."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mal_server.config.server import ServerConfig, default_config
from mal_train.config.spec import Spec
from mal_train.core.errors import CheckpointError, ConfigError
from mal_train.core.yaml_config import dump, load_yaml, validate
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.encrypted_file import chunk_padding, write_encrypted
from mal_train.kernel.checkpoint.tensorfile import DIGEST_NAME
from tests.form import FORM
from tests.mal_train.kernel.checkpoint.checkpoints import raw, resume_checkpoint
from tests.mal_train.kernel.checkpoint.key_pair import DECRYPTION_KEY, ENCRYPTION_KEY

FILES = FORM.pick(300, 20_000)
MAX_CPU_S = 10.0
"""Processor time of one file, far above any that was measured."""
MAX_MESSAGE = 10_000

NUMBERS = (0, -1, 1, 7, 2**31, 2**63, 2**64, 10**40, 1e308, -0.0, 0.5, True, None, "x", "9" * 5000)
JSON_VALUES: tuple[Any, ...] = (
    *NUMBERS,
    [],
    {},
    [[]] * 1000,
    {"$f": "nan"},
    {"$f": "inf"},
    {"$t": "student.a"},
    {"$tuple": [1]},
    {"$dict": [[[1], 2]]},
    {"$x": 0},
)


def deep(levels: int) -> str:
    """Returns JSON lists within one another."""
    return "[" * levels + "]" * levels


def changed(value: Any, rng: random.Random) -> Any:
    """Returns a JSON tree with one random change somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(list(value))
        if rng.random() < 0.2:
            return {key: item for key, item in value.items() if key != name}
        return {**value, name: changed(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        return [*value[:index], changed(value[index], rng), *value[index + 1 :]]
    return rng.choice(JSON_VALUES)


def forged(table: dict[str, Any], data: bytes, rng: random.Random) -> bytes:
    """Returns a plain file with a changed table of tensors, or with changed settings."""
    table = json.loads(json.dumps(table))
    metadata = table["__metadata__"]
    metadata.pop(DIGEST_NAME, None)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(["model", "labeler", "categories", "provenance", "training", "kind", "schema", ""])
        if name in ("kind", "schema"):
            metadata[name] = rng.choice(["weights", "resume", "x", 1, ["x"]])
        elif name and rng.random() < 0.05:
            metadata[name] = rng.choice([deep(100_000), deep(20), "{" * 10, '{"a":' * 50_000])
        elif name and isinstance(metadata.get(name), str):
            try:
                metadata[name] = json.dumps(changed(json.loads(metadata[name]), rng))
            except (ValueError, RecursionError):
                metadata[name] = "{}"
        else:
            row = rng.choice(list(table))
            table[row] = changed(table[row], rng)
            if not isinstance(table["__metadata__"], dict):
                break
    return raw(table, data[: rng.choice([len(data), rng.randrange(len(data))])] if rng.random() < 0.2 else data)


def edited(content: bytes, rng: random.Random) -> bytes:
    """Returns a file with flipped bits, a cut, a repetition, or a forged length."""
    out = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(out)) if rng.random() < 0.5 else rng.randrange(min(len(out), 400))
        kind = rng.randrange(5)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at + 1 :]
        elif kind == 2:
            out[at:at] = out[at : at + rng.randrange(1, 200)]
        elif kind == 3:
            out[0:8] = rng.choice([0, 1, len(out), 2**20, 2**40, 2**63]).to_bytes(8, "little")
        else:
            out[at : at + 4] = rng.randbytes(4)
    return bytes(out)


def outcomes(count: int, attempt: Callable[[random.Random], None], errors: type[Exception]) -> Counter[str]:
    """Runs attempts of a seeded generator; fails for another error, a long message or much processor time."""
    found: Counter[str] = Counter()
    for index in range(count):
        rng = random.Random(f"{FORM.seed} {index}")
        began = time.process_time()
        try:
            attempt(rng)
            found["accepted"] += 1
        except errors as error:
            is_long = "" if len(str(error)) < MAX_MESSAGE else ", long message"
            found[f"{type(error).__name__}{is_long}"] += 1
        except Exception as error:  # every other error is a traceback that a user would see
            raise AssertionError(f"file {index}") from error
        assert time.process_time() - began < MAX_CPU_S, index
    assert not any("long" in name for name in found), found
    print(dict(found))
    return found


def test_a_hostile_checkpoint_loads_or_gives_one_error(tmp_path: Path) -> None:
    plain, sealed, path = tmp_path / "plain", tmp_path / "sealed", tmp_path / "a"
    save_checkpoint(plain, resume_checkpoint(), None)
    save_checkpoint(sealed, resume_checkpoint(), ENCRYPTION_KEY)
    content, ciphertext = plain.read_bytes(), sealed.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:end])

    def attempt(rng: random.Random) -> None:
        kind = rng.randrange(4)
        key = DECRYPTION_KEY if kind >= 2 else None
        if kind == 0:
            path.write_bytes(edited(content, rng))
        elif kind == 1:
            path.write_bytes(forged(table, content[end:], rng))
        elif kind == 2:
            path.write_bytes(edited(ciphertext, rng))
        else:
            hostile = forged(table, content[end:], rng)
            hostile += bytes(chunk_padding(len(hostile))) if rng.random() < 0.1 else b""
            write_encrypted(path, [memoryview(hostile)], ENCRYPTION_KEY)
        load_checkpoint(path, key, skip_training_state=rng.random() < 0.3)

    found = outcomes(FILES, attempt, CheckpointError)
    assert {"Altered", "UnknownLayout", "Truncated", "WrongKey"} <= set(found), found


PIECES = (
    *"&*!|>{}[],:#'\"%@`\t\n -",
    *("!!int ", "&a ", "*a", "<<: ", "1e999", "-0", "null", "\x85", "\ufeff", "? ", "9" * 99),
)


def edited_text(text: str, rng: random.Random) -> str:
    """Returns YAML with random insertions, and with a random value in place of another."""
    for _ in range(rng.choice((1, 1, 2, 6))):
        if rng.random() < 0.5:
            start = rng.randrange(len(text) + 1)
            piece = rng.choice(PIECES) * rng.choice((1, 1, 1, 50))
            text = text[:start] + piece + text[start + rng.choice((0, 0, 5)) :]
        else:
            lines = text.splitlines(keepends=True)
            index = rng.randrange(len(lines))
            name, colon, _ = lines[index].partition(":")
            if colon and not name.lstrip().startswith("#"):
                lines[index] = f"{name}: {json.dumps(rng.choice(JSON_VALUES))}\n"
            text = "".join(lines)
    return text


@pytest.mark.parametrize("model", [ServerConfig, Spec])
def test_hostile_settings_are_read_or_give_one_error(tmp_path: Path, model: type[Any]) -> None:
    text = default_config() if model is ServerConfig else dump(Spec(), comments=False)
    if model is ServerConfig:
        text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")) + "\n"
    path = tmp_path / "settings.yaml"

    def attempt(rng: random.Random) -> None:
        path.write_text(edited_text(text, rng), encoding="utf-8")
        validate(model, load_yaml(path), source=str(path))

    found = outcomes(FORM.pick(100, FILES), attempt, ConfigError)
    assert {"accepted", "ConfigError"} <= set(found), found
