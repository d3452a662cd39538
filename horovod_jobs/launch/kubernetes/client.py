"""A namespace of a cluster, as far as jobs need it: make objects, patch and delete them, read pods and logs.

The thin half of ``launch=mpijob`` and ``launch=trainjob``: everything that is decided is decided in ``manifests`` and ``pods``.
It uses the ``kubernetes`` package, an extra, with the same configuration as kubectl.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from horovod_jobs.errors import ConfigError, JobError, SetupError
from horovod_jobs.launch.kubernetes.manifests import Manifest

REQUEST_S = 30.0  # for an answer of the cluster; a log that is followed may be silent for any time
_MERGE = "application/merge-patch+json"
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Kind:
    """A kind of object: where the cluster keeps it, and for a job where its spec says whether it may run."""

    group: str
    version: str
    plural: str
    suspend: tuple[str, ...] = ()
    needs: str = ""  # what must be installed in the cluster for it


JOB_KINDS = {
    "MPIJob": Kind("kubeflow.org", "v2beta1", "mpijobs", ("runPolicy", "suspend"), "Kubeflow's MPI operator"),
    "TrainJob": Kind("trainer.kubeflow.org", "v1alpha1", "trainjobs", ("suspend",), "Kubeflow Trainer v2"),
}
KINDS = {
    **JOB_KINDS,
    "TrainingRuntime": Kind("trainer.kubeflow.org", "v1alpha1", "trainingruntimes", needs="Kubeflow Trainer v2"),
    "NetworkPolicy": Kind("networking.k8s.io", "v1", "networkpolicies"),
    "ConfigMap": Kind("", "v1", "configmaps"),
}


class Cluster:
    """A namespace of a cluster; ``context`` and ``namespace`` are kubectl's own where they are None.

    Raises:
        SetupError: the ``kubernetes`` package is not installed, or no cluster is configured.
    """

    def __init__(self, *, context: str | None = None, namespace: str | None = None) -> None:
        try:
            import kubernetes
        except ImportError as error:
            raise SetupError(
                "the kubernetes package is not installed; pip install 'horovod-jobs[kubernetes]', or give the manifests to kubectl: "
                "horovod-jobs ... launch.dry_run=true | kubectl apply -f -"
            ) from error
        configured = kubernetes.client.Configuration()
        own = _configure(kubernetes, configured, context=context)
        self.namespace: str = namespace or own
        self._refusal: Any = kubernetes.client.exceptions.ApiException
        api = kubernetes.client.ApiClient(configured)
        self._core: Any = kubernetes.client.CoreV1Api(api)
        self._objects: Any = kubernetes.client.CustomObjectsApi(api)

    def create(self, manifest: Manifest) -> Manifest:
        """Make an object; the cluster is to refuse fields that it does not know. Gives it as the cluster has it.

        Raises:
            ConfigError: the cluster refuses it, or it is there already.
            SetupError: the cluster does not answer, does not know the kind, or does not let you.
        """
        kind, name = KINDS[manifest["kind"]], f"{manifest['kind']} {manifest['metadata']['name']}"
        place, options = (self.namespace, manifest), {"field_validation": "Strict", "_request_timeout": REQUEST_S}
        if not kind.group:
            self._ask(lambda: self._core.create_namespaced_config_map(*place, **options), f"make {name}", kind)
            return manifest
        where = (kind.group, kind.version, self.namespace, kind.plural, manifest)
        return self._plain(
            self._ask(lambda: self._objects.create_namespaced_custom_object(*where, **options), f"make {name}", kind)
        )

    def patch(self, kind_name: str, name: str, change: Manifest) -> None:
        """Merge a change into an object."""
        kind, options = KINDS[kind_name], {"_request_timeout": REQUEST_S, "_content_type": _MERGE}
        if not kind.group:
            call = lambda: self._core.patch_namespaced_config_map(name, self.namespace, change, **options)  # noqa: E731
        else:
            where = (kind.group, kind.version, self.namespace, kind.plural, name, change)
            call = lambda: self._objects.patch_namespaced_custom_object(*where, **options)  # noqa: E731
        self._ask(call, f"change {kind_name} {name}", kind)

    def delete(self, kind_name: str, name: str) -> None:
        """Delete an object."""
        kind, options = KINDS[kind_name], {"_request_timeout": REQUEST_S}
        if not kind.group:
            call = lambda: self._core.delete_namespaced_config_map(name, self.namespace, **options)  # noqa: E731
        else:
            where = (kind.group, kind.version, self.namespace, kind.plural, name)
            call = lambda: self._objects.delete_namespaced_custom_object(*where, **options)  # noqa: E731
        self._ask(call, f"delete {kind_name} {name}", kind)

    def job(self, name: str) -> Manifest:
        """The MPIJob or TrainJob of that name.

        Raises:
            ConfigError: there is neither.
        """
        for kind in JOB_KINDS.values():
            where = (kind.group, kind.version, self.namespace, kind.plural, name)
            try:
                return self._plain(self._objects.get_namespaced_custom_object(*where, _request_timeout=REQUEST_S))
            except self._refusal as error:
                if error.status != 404:  # 404: none of that name, or the operator of this kind is not installed.
                    self._fail(error, f"read the job {name}", kind)
            except Exception as error:
                self._fail(error, f"read the job {name}", kind)
        raise ConfigError(
            f"there is no MPIJob or TrainJob {name} in the namespace {self.namespace}; see kubectl get mpijobs, or give --namespace"
        )

    def pods(self, selector: str) -> list[Manifest]:
        """Pods with these labels, the oldest first."""
        options = {"label_selector": selector, "_preload_content": False, "_request_timeout": REQUEST_S}
        answer = self._ask(
            lambda: self._core.list_namespaced_pod(self.namespace, **options), f"list pods of {selector}"
        )
        found: list[Manifest] = json.loads(answer.data)["items"]
        return sorted(found, key=lambda pod: (pod["metadata"].get("creationTimestamp") or "", pod["metadata"]["name"]))

    def log(self, pod: str, *, follow: bool = False) -> Iterator[str]:
        """Lines of a pod's log; with ``follow`` until it has ended."""
        options: dict[str, Any] = {"follow": follow, "_preload_content": False}
        if not follow:  # One that is followed may be silent for any time.
            options["_request_timeout"] = REQUEST_S
        answer = self._ask(
            lambda: self._core.read_namespaced_pod_log(pod, self.namespace, **options), f"read the log of {pod}"
        )
        rest = b""
        try:
            for piece in answer.stream(4096):
                *lines, rest = (rest + piece).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
        except Exception as error:
            self._fail(error, f"read the log of {pod}")
        finally:
            answer.release_conn()
        if rest:
            yield rest.decode(errors="replace")

    def _ask(self, call: Callable[[], Any], what: str, kind: Kind | None = None) -> Any:
        try:
            return call()
        except Exception as error:
            self._fail(error, what, kind)

    def _fail(self, error: Exception, what: str, kind: Kind | None = None) -> NoReturn:
        """Say in a sentence why the cluster did not do what it was asked."""
        if isinstance(error, JobError):
            raise error
        if not isinstance(error, self._refusal) or not error.status:
            raise SetupError(
                f"cannot {what}: the cluster does not answer ({_first(error)}); see that kubectl works here"
            ) from error
        said = _message(error)
        if error.status == 404 and kind is not None and kind.needs:
            raise SetupError(f"cannot {what}: {said}; it needs {kind.needs} in the cluster") from error
        if error.status == 409:
            raise ConfigError(
                f"cannot {what}: {said}; delete the earlier job (kubectl delete mpijob,trainjob NAME), or set launch.kubernetes.name"
            ) from error
        if error.status in (401, 403):
            raise SetupError(
                f"cannot {what}: {said}; ask for the right, or choose another context or namespace"
            ) from error
        raise ConfigError(f"cannot {what}: {said} (status {error.status}); correct the value it names") from error

    @staticmethod
    def _plain(answer: Any) -> Manifest:
        if not isinstance(answer, dict):
            raise SetupError(
                f"the cluster answered with {type(answer).__name__} and not with an object; update the kubernetes package"
            )
        return answer


def _configure(kubernetes: Any, configured: Any, *, context: str | None) -> str:
    """Read kubectl's configuration, or inside a pod the service account's. Gives its namespace."""
    from kubernetes.config import ConfigException

    try:
        kubernetes.config.load_kube_config(context=context, client_configuration=configured)
        contexts, active = kubernetes.config.list_kube_config_contexts()
        chosen = active if context is None else next(entry for entry in contexts if entry["name"] == context)
        return str(chosen["context"].get("namespace") or "default")
    except ConfigException as error:
        if context is None and _SERVICE_ACCOUNT.is_file():
            kubernetes.config.load_incluster_config(client_configuration=configured)
            return _SERVICE_ACCOUNT.read_text().strip()
        raise SetupError(
            f"no cluster is configured ({_first(error)}); see that kubectl works here, or set KUBECONFIG"
        ) from error


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason or f"status {error.status}")


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
