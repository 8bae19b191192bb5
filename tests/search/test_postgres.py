"""The PostgreSQL server that tests start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import psutil
import psycopg
import pytest

from tests.postgres import PostgresServer, sources

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["the machine's", "the wheel's"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    programs = sources().get(request.param)
    if programs is None:
        pytest.skip(f"no PostgreSQL server: {request.param}")
    with closing(PostgresServer(tmp_path_factory.mktemp("server"), programs)) as server:
        yield server
    assert not server.folder.exists()


def test_a_crashed_server_comes_back_with_its_committed_data(server: PostgresServer) -> None:
    server.start()
    url = server.database("it's")
    with closing(psycopg.connect(url, autocommit=True)) as client:
        client.execute("CREATE TABLE t AS SELECT 1 AS x")
        before = server.pid
        server.restart()
        with pytest.raises(psycopg.OperationalError):
            client.execute("SELECT x FROM t")
    assert server.pid not in (before, None)
    with closing(psycopg.connect(url)) as client:
        assert client.execute("SELECT x FROM t").fetchall() == [(1,)]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_stopping_leaves_no_process(server: PostgresServer, mode: str) -> None:
    server.start()
    with closing(psycopg.connect(server.database(mode))):
        children = psutil.Process(server.pid).children(recursive=True)
        server.stop(mode)
        assert children
        assert not any(child.is_running() for child in children)
        assert server.pid is None
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(server.url(mode))


def test_a_failing_start_shows_the_log(server: PostgresServer) -> None:
    server.start()
    server.stop()
    settings = server.data / "postgresql.auto.conf"
    before = settings.read_text()
    settings.write_text("no_such_setting = 1\n")
    with pytest.raises(RuntimeError, match="no_such_setting"):
        server.start()
    assert server.pid is None
    settings.write_text(before)


def test_each_test_has_its_own_database(postgres: PostgresServer, database: str) -> None:
    with closing(psycopg.connect(database)) as client:
        assert client.execute("SELECT count(*) FROM pg_stat_user_tables").fetchone() == (0,)
    postgres.stop()  # the next test that asks for a database finds it up


def test_a_database_is_available_after_a_test_that_stopped_the_server(database: str) -> None:
    psycopg.connect(database).close()
