"""A test double of a Kubernetes API server: the few paths that jobs need, over real HTTP, for the real client.

It is not Kubernetes: it keeps objects as they come, knows the kinds it was told of, and starts no pod. What a cluster makes of a
manifest is tested elsewhere: by the schemas (test_kubernetes.py), and by doing the operator's work (tests/cluster/test_mpijob.py).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

ALL_KINDS = ("configmaps", "networkpolicies", "mpijobs", "trainjobs", "trainingruntimes")


@dataclass
class FakeCluster:
    """What the server holds, and what it was asked."""

    kinds: tuple[str, ...] = ALL_KINDS
    objects: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)  # (namespace, plural, name)
    pods: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # "METHOD path content-type"
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)  # plural -> status and message
    log_pause_s: float = 0.0  # between the lines of a log that is followed
    kube_config: Path = Path()
    url: str = ""

    def add_pod(self, name: str, role: str, *, job: str = "demo", phase: str = "Running", **container: Any) -> None:
        """A pod of a job, with one container."""
        labels = {"horovod-jobs/job": job, "horovod-jobs/role": role}
        status = {"name": role, "ready": phase == "Running", "restartCount": 0, **container}
        made = f"2026-01-01T00:00:{len(self.pods):02d}Z"
        self.pods.append({
            "metadata": {"name": name, "labels": labels, "creationTimestamp": made},
            "spec": {"nodeName": "node-1"},
            "status": {"phase": phase, "containerStatuses": [status]},
        })  # fmt: skip


def merge(into: dict[str, Any], change: dict[str, Any]) -> None:
    """A JSON merge patch (RFC 7396)."""
    for key, value in change.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


class _Handler(BaseHTTPRequestHandler):
    cluster: FakeCluster

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, message: str) -> None:
        self._answer(
            status, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": status}
        )

    def _serve(self) -> None:
        path, length = urlsplit(self.path), int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        kind = f" {self.headers['Content-Type']}" if self.command in ("POST", "PATCH") else ""
        self.cluster.asked.append(f"{self.command} {self.path}{kind}")
        # /api/v1/namespaces/NS/PLURAL[/NAME[/log]] or /apis/GROUP/VERSION/namespaces/NS/PLURAL[/NAME]
        words = path.path.strip("/").split("/")[2 if path.path.startswith("/api/") else 3 :]
        if len(words) < 3 or words[0] != "namespaces":
            self._refuse(404, "the server could not find the requested resource")
            return
        _, namespace, plural, *rest = words
        if plural in self.cluster.refuse and self.command != "DELETE":
            self._refuse(*self.cluster.refuse[plural])
        elif plural == "pods":
            self._pods(rest, parse_qs(path.query))
        elif plural not in self.cluster.kinds:
            self._refuse(404, "the server could not find the requested resource")
        else:
            self._object((namespace, plural, rest[0] if rest else body["metadata"]["name"]), body)

    def _object(self, key: tuple[str, str, str], body: dict[str, Any]) -> None:
        known, title = self.cluster.objects, f'{key[1]} "{key[2]}"'
        if self.command == "POST":
            if key in known:
                self._refuse(409, f"{title} already exists")
                return
            known[key] = {**body, "metadata": {**body["metadata"], "uid": f"uid-{key[2]}"}}
        elif key not in known:
            self._refuse(404, f"{title} not found")
            return
        elif self.command == "PATCH":
            merge(known[key], body)
        held = known.pop(key) if self.command == "DELETE" else known[key]
        self._answer(201 if self.command == "POST" else 200, held)

    def _pods(self, rest: list[str], query: dict[str, list[str]]) -> None:
        if rest:
            name, _ = rest
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.end_headers()
            for line in self.cluster.logs[name]:
                self.wfile.write(line.encode() + b"\n")
                self.wfile.flush()
                time.sleep(
                    self.cluster.log_pause_s
                    if query.get("follow") == ["true"] or query.get("follow") == ["True"]
                    else 0
                )
            return
        wanted = dict(part.split("=") for part in query["labelSelector"][0].split(","))
        found = [pod for pod in self.cluster.pods if wanted.items() <= pod["metadata"]["labels"].items()]
        self._answer(200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": found})

    do_GET = do_POST = do_PATCH = do_DELETE = _serve  # noqa: N815


@contextmanager
def fake_cluster(directory: Path) -> Iterator[FakeCluster]:
    """A server on a free port and a kubectl configuration that leads to it, in the namespace ``ml``."""
    cluster = FakeCluster()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"cluster": cluster}))
    server.daemon_threads = True
    cluster.url = f"http://127.0.0.1:{server.server_address[1]}"
    cluster.kube_config = directory / "kubeconfig"
    cluster.kube_config.write_text(yaml.safe_dump({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": cluster.url}}],
        "users": [{"name": "test", "user": {"token": "not-a-secret"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "ml"}}],
    }))  # fmt: skip
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
