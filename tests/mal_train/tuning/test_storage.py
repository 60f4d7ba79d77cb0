"""Storages: addresses, files, databases and servers that cannot be used, and credentials that are never printed."""

import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage
from sqlalchemy.exc import IntegrityError, OperationalError

from mal_train.config.spec import load_spec
from mal_train.config.tune import redacted_url, without_credentials
from mal_train.core.errors import ConfigError
from mal_train.core.proxies import exempt_this_machine
from mal_train.core.yaml_config import dump
from mal_train.distributed.launch import free_port
from mal_train.tuning import storage as storage_module
from mal_train.tuning.storage import StudyStorageError, open_storage, quiet_optuna, storage_errors, storage_url
from tests.proxy import recording_proxy

SECRET = "hunter2"


def create(storage: BaseStorage, name: str = "s") -> optuna.Study:
    return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)


def test_the_default_is_a_file_in_the_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage_url(None, tmp_path) == f"sqlite:///{tmp_path}/study.db"
    monkeypatch.setenv("STORE", "sqlite:///a.db")
    assert storage_url("env:STORE", tmp_path) == "sqlite:///a.db"
    (tmp_path / "address").write_text("journal:///b\n")
    assert storage_url(f"file:{tmp_path}/address", tmp_path) == "journal:///b"
    with pytest.raises(ConfigError, match=r"tune\.storage"):
        storage_url("env:NOT_SET_ANYWHERE", tmp_path)


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_a_file_keeps_the_trials(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in (f"{scheme}:///relative", f"{scheme}:///{tmp_path}/absolute"):
        study = create(open_storage(url))
        study.tell(study.ask(), 0.5)
        assert create(open_storage(url)).best_value == 0.5
    assert {path.name for path in tmp_path.iterdir()} == {"relative", "absolute"}


@pytest.mark.parametrize(
    "url",
    [
        "study.db",
        "redis://host/0",
        "journal://host/file",
        "journal:///",
        "grpc://host",
        "grpc://host:port",
        "nodb://x/y",
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"tune\.storage"):
        open_storage(url)


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_a_file_in_a_folder_that_is_missing_is_an_error_of_the_machine(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(StudyStorageError) as caught:
        open_storage(f"{scheme}:///{tmp_path}/nowhere/study")
    assert caught.value.exit_code == 4
    assert "nowhere" in str(caught.value)


@pytest.mark.parametrize("content", [b"SQLite is something else" * 100, b'{"images": []}\n{}\n', b"\xff\xfe\n\n"])
def test_a_file_of_another_program_is_refused_and_stays(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    for scheme in ("sqlite", "journal"):
        with pytest.raises(StudyStorageError), storage_errors("x"):
            create(open_storage(f"{scheme}:///{path}"))
        assert path.read_bytes() == content


def test_a_database_that_another_process_locks_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "CONNECT_TIMEOUT_S", 0.2)
    url = f"sqlite:///{tmp_path}/study.db"
    storage = open_storage(url)
    study = create(storage)
    with sqlite3.connect(tmp_path / "study.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StudyStorageError, match="locked"):
            open_storage(url)
        with pytest.raises(StudyStorageError, match="locked"), storage_errors(url), quiet_optuna():
            study.ask()
        other.execute("ROLLBACK")
    study.tell(study.ask(), 1.0)
    assert create(open_storage(url)).best_value == 1.0


def test_the_lock_of_a_killed_process_on_a_journal_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "LOCK_GRACE_S", 3)
    monkeypatch.chdir(tmp_path)
    create(open_storage("journal:///journal"))
    (tmp_path / "journal.lock").symlink_to(tmp_path / "journal")
    study = create(open_storage("journal:///journal"))
    study.tell(study.ask(), 0.5)
    assert not (tmp_path / "journal.lock").is_symlink()


def test_a_line_of_a_journal_that_a_killed_process_cut_is_removed(tmp_path: Path) -> None:
    url = f"journal:///{tmp_path}/journal"
    study = create(open_storage(url))
    study.tell(study.ask(), 0.5)
    with (tmp_path / "journal").open("ab") as file:
        file.write(b'{"op_code":4,"worker')
    study = create(open_storage(url))
    study.tell(study.ask(), 0.7)
    assert [trial.value for trial in create(open_storage(url)).trials] == [0.5, 0.7]
    assert all(map(json.loads, (tmp_path / "journal").read_text().splitlines()))


SERVER = """
import sys
from optuna.storages import get_storage, run_grpc_proxy_server
run_grpc_proxy_server(get_storage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
"""


def test_a_server_of_optuna_on_this_machine_is_reached_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    arguments = [sys.executable, "-W", "ignore", "-c", SERVER, f"sqlite:///{tmp_path}/study.db", str(port)]
    with recording_proxy() as proxy, subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as server:
        for variable in ("http_proxy", "grpc_proxy"):
            monkeypatch.setenv(variable, proxy.url)
        monkeypatch.setenv("no_proxy", "other.example")
        monkeypatch.setenv("NO_PROXY", "other.example")
        exempt_this_machine()  # as every command does
        try:
            study = create(open_storage(f"grpc://127.0.0.1:{port}"))
            study.tell(study.ask(), 0.5)
        finally:
            server.send_signal(signal.SIGKILL)
        assert proxy.requests == []


def test_a_server_of_optuna_keeps_the_trials_and_its_end_is_one_error(tmp_path: Path) -> None:
    port = free_port()
    arguments = [sys.executable, "-W", "ignore", "-c", SERVER, f"sqlite:///{tmp_path}/study.db", str(port)]
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as server:
        try:
            url = f"grpc://127.0.0.1:{port}"
            study = create(open_storage(url))
            study.tell(study.ask(), 0.5)
            assert create(open_storage(url)).best_value == 0.5
        finally:
            server.send_signal(signal.SIGKILL)
    with pytest.raises(StudyStorageError, match=rf"127\.0\.0\.1:{port}"), storage_errors(url):
        study.ask()


@pytest.mark.parametrize("scheme", ["grpc", "postgresql"])
def test_an_unreachable_server_is_one_error_without_its_credentials(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "CONNECT_TIMEOUT_S", 0.5)
    address = f"127.0.0.1:{free_port()}"
    url = f"grpc://{address}" if scheme == "grpc" else f"postgresql://ann:{SECRET}@{address}/tune?application_name=x"
    # Without a driver for PostgreSQL, the error is about that.
    with pytest.raises((StudyStorageError, ConfigError)) as caught:
        open_storage(url)
    assert address in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://ann:{SECRET}@db/tune",
        f"postgresql+psycopg://ann:a/b?{SECRET}@db:5432/tune",
        f"mysql://ann:x@{SECRET}@db/tune?charset=utf8",
        f"mysql://ann:12/{SECRET}@db/tune",  # of a web address, host, port and path
        f"postgresql://db/tune?user=ann&password={SECRET}",
        f"ann:{SECRET}@db/tune",
    ],
)
def test_no_message_and_no_file_holds_the_credentials_of_a_storage(url: str, tmp_path: Path) -> None:
    assert SECRET not in redacted_url(url)
    assert SECRET not in without_credentials(f"cannot connect with {url}", url)
    path = tmp_path / "spec.yaml"
    path.write_text(f"tune: {{storage: '{url}'}}\n")
    spec = load_spec(path, [])
    assert spec.tune.storage == url
    assert SECRET not in dump(spec.without_secrets())
    assert SECRET not in repr(spec)
    with pytest.raises(ConfigError) as caught:
        load_spec(None, [f"tune.storage={url}"])
    assert SECRET not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        open_storage(url)
    assert SECRET not in str(caught.value)


def test_an_address_without_credentials_may_stand_on_the_command_line() -> None:
    for url in (
        "sqlite:///a@b.db",
        "sqlite:///a#1.db",
        "journal:///x",
        "grpc://host:13000",
        "env:STORAGE",
        "postgresql://db/tune",
    ):
        spec = load_spec(None, [f"tune.storage={url}"])
        assert spec.without_secrets().tune.storage == url


def test_tables_that_another_process_creates_at_the_same_time_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [
        OperationalError("CREATE TABLE studies", None, Exception("table studies already exists")),
        IntegrityError("INSERT", None, Exception("UNIQUE constraint failed: alembic_version.version_num")),
    ]

    def database(*args: Any, **options: Any) -> BaseStorage:
        if faults:
            raise faults.pop()
        return optuna.storages.RDBStorage(*args, **options)

    monkeypatch.setattr(storage_module, "RDBStorage", database)
    monkeypatch.setattr(storage_module, "CREATION_PAUSES_S", (0.0, 0.0))
    assert create(open_storage(f"sqlite:///{tmp_path}/study.db")).trials == []
    faults.append(OperationalError("SELECT", None, Exception("disk I/O error")))
    with pytest.raises(StudyStorageError, match="disk I/O error"):
        open_storage(f"sqlite:///{tmp_path}/study.db")
