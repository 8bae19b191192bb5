"""A stand-in for MLflow's server, which answers as a test says."""

from __future__ import annotations

import http.server
import json
import threading
import urllib.parse
import uuid
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """An answer that replaces the server's own."""

    status: int
    body: bytes = b"<html>a proxy says no</html>"
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed


class Request(NamedTuple):
    """What the server was asked."""

    method: str
    path: str
    body: Any
    """JSON; for an upload, its size."""


class StandIn:
    """One experiment and its runs, in memory; `answer` may replace any answer."""

    def __init__(self) -> None:
        self.answer: Callable[[Request], Answer | None] = lambda request: None
        self.runs: dict[str, dict[str, Any]] = {}
        self.points: list[tuple[str, int]] = []
        """Name and step of each point of a metric, in the order of their arrival."""
        self.params: list[str] = []
        self.tags: list[str] = []
        self.files: list[str] = []
        self.requests: list[Request] = []
        stand_in = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                upload = self.command == "PUT"
                parts = urllib.parse.urlsplit(self.path)
                body: Any = len(raw) if upload else json.loads(raw or b"{}")
                body = body or dict(urllib.parse.parse_qsl(parts.query))
                request = Request(self.command, parts.path, body)
                stand_in.requests.append(request)
                status, said, headers = stand_in.answer(request) or Answer(
                    200, json.dumps(stand_in.reply(request)).encode()
                )
                with suppress(ConnectionError):  # the client has not waited for the answer
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(said))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(said)

            do_GET = do_POST = do_PUT = do_PATCH = answer  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.uri = f"http://127.0.0.1:{self._server.server_port}"

    def reply(self, request: Request) -> Any:
        """What a healthy server answers."""
        experiment = {
            "experiment_id": "0",
            "name": "Default",
            "artifact_location": "mlflow-artifacts:/0",
            "lifecycle_stage": "active",
        }
        path, body = request.path, request.body
        if path.endswith("experiments/search"):
            return {"experiments": [experiment]}
        if "experiments/get" in path:
            return {"experiment": experiment}
        if path.endswith("runs/create"):
            run_id = uuid.uuid4().hex  # MLflow caches where the artifacts of a run are
            self.runs[run_id] = {
                "run_id": run_id,
                "run_uuid": run_id,
                "run_name": "fox",
                "experiment_id": "0",
                "status": "RUNNING",
                "start_time": 1,
                "artifact_uri": f"mlflow-artifacts:/0/{run_id}/artifacts",
                "lifecycle_stage": "active",
            }
            return {"run": self._run(run_id)}
        if path.endswith("runs/get"):
            return {"run": self._run(body["run_id"])}
        if path.endswith("runs/update"):
            self.runs[body["run_id"]]["status"] = body["status"]
            return {"run_info": self.runs[body["run_id"]]}
        if path.endswith("log-batch"):
            self.points += [(m["key"], m.get("step", 0)) for m in body.get("metrics", [])]
            self.params += [param["key"] for param in body.get("params", [])]
            self.tags += [tag["key"] for tag in body.get("tags", [])]
        if request.method == "PUT":
            self.files.append(path.rpartition("/")[2])
        return {}

    def _run(self, run_id: str) -> dict[str, Any]:
        info = {**self.runs[run_id]}
        return {"info": info, "data": {"metrics": info.pop("latest", [])}, "inputs": {}}

    @property
    def statuses(self) -> list[str]:
        """The status of each run."""
        return [str(run["status"]) for run in self.runs.values()]

    def __enter__(self) -> StandIn:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
