"""Pods as namespaces over the image: what the MPI operator and a kubelet do with an MPIJob, done for one machine.

A pod is a network, a host name, process ids, shared memory and a root file system of its own (a container of buildah's over the
image), in which its command runs as the user that the manifest names, without capabilities. The operator's part follows its source
(kubeflow/mpi-operator, pkg/controller/mpi_job_controller.go): the host file, the job's ssh key, the variables, the order of things.
What it does not do: schedule, pull, limit, enforce the network policy.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks._host_files import SWITCH, program
from benchmarks.hosts import Hosts, end
from tests.cluster.image import Image

NAMESPACE = "ml"
_SSH_FILES = {"id_rsa": "key", "id_rsa.pub": "key.pub", "authorized_keys": "key.pub"}
# As the first process of a pod: its private parts, then its command in its root file system, as its user and with no rights.
_POD = """
set -e
mkdir -p "$2/$1"
hostname "$1"
. "$2/$1.sh"
"""


class Job:
    """An MPIJob on this machine, from the text that ``kubectl apply -f -`` would take."""

    def __init__(self, text: str, *, image: Image, directory: Path, volumes: Mapping[str, Path], data: Path) -> None:
        self.manifests = {entry["kind"]: entry for entry in yaml.safe_load_all(text)}
        self.spec = self.manifests["MPIJob"]["spec"]
        self.name = self.manifests["MPIJob"]["metadata"]["name"]
        self.image, self.directory, self.data = image, directory, data
        self.claims = dict(volumes)
        count = self.spec["mpiReplicaSpecs"]["Worker"]["replicas"]
        self.workers = [f"{self.name}-worker-{index}" for index in range(count)]
        self.attempts = 0
        self._stack = ExitStack()
        launchers = [f"{self.name}-launcher-{index}" for index in range(3)]
        self.net = Hosts([*self.workers, *launchers], directory)
        self._roots: dict[str, Path] = {}

    # --- the operator ---------------------------------------------------------------------------------------------------
    def fqdn(self, worker: str) -> str:
        return f"{worker}.{self.name}-worker.{NAMESPACE}.svc"

    def prepare(self) -> None:
        """The ConfigMap NAME-config, the Secret NAME-ssh, and the network."""
        config, keys, job = (self._made(name) for name in ("etc-mpi", "ssh", "config"))
        slots = self.spec["slotsPerWorker"]
        (config / "hostfile").write_text("".join(f"{self.fqdn(name)} slots={slots}\n" for name in self.workers))
        self.discover(self.workers)
        subprocess.run(
            [
                program("ssh-keygen"),
                "-q",
                "-t",
                "ecdsa",
                "-b",
                "521",
                "-m",
                "PEM",
                "-N",
                "",
                "-C",
                "",
                "-f",
                str(self.directory / "key"),
            ],
            check=True,
        )
        for name, source in _SSH_FILES.items():
            shutil.copy(self.directory / source, keys / name)
            (keys / name).chmod(0o644)  # A secret's default; it belongs to root.
        for name, text in self.manifests["ConfigMap"]["data"].items():
            (job / name).write_text(text)
        self.net.hold("switch", SWITCH)

    def discover(self, running: Sequence[str]) -> None:
        """What the operator writes as workers come and go: names without slots."""
        path = self.directory / "etc-mpi" / "discover_hosts.sh"
        path.write_text("#!/bin/sh\n" + "".join(f"echo {self.fqdn(name)}\n" for name in running))
        path.chmod(0o555)

    def start_worker(self, name: str, *, keys: Path | None = None) -> None:
        """A worker pod, or the container of one started again: its files are new, its name and address are the old ones.

        ``keys``: a directory of ssh keys instead of the job's own, for what pretends to be a worker.
        """
        template = self.spec["mpiReplicaSpecs"]["Worker"]["template"]
        mounts = {} if keys is None else {self.spec["sshAuthMountPath"]: keys}
        self._start(name, template, {"K_MPI_JOB_ROLE": "worker"}, mounts)

    def start_launcher(self) -> str:
        """The pod of the next attempt; the operator makes it when every worker is ready."""
        assert self.spec["launcherCreationPolicy"] == "WaitForWorkersReady"
        self.wait_until_ready()
        name = f"{self.name}-launcher-{self.attempts}"
        self.attempts += 1
        env = {
            "K_MPI_JOB_ROLE": "launcher",
            "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
            "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
            "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
            "OMPI_MCA_orte_set_default_slots": str(self.spec["slotsPerWorker"]),
            "NVIDIA_VISIBLE_DEVICES": "",
            "NVIDIA_DRIVER_CAPABILITIES": "",
        }
        self._start(
            name, self.spec["mpiReplicaSpecs"]["Launcher"]["template"], env, {"/etc/mpi": self.directory / "etc-mpi"}
        )
        return name

    def wait_until_ready(self, *, timeout_s: float = 60.0) -> None:
        """The workers' readiness probe, as their manifest has it."""
        (container,) = self.spec["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
        port = container["readinessProbe"]["tcpSocket"]["port"]
        deadline = time.monotonic() + timeout_s
        for name in self.workers:
            while self.inside(name, ["sh", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}"], shell="bash").returncode:
                assert time.monotonic() < deadline, f"{name} is not ready: {self.log(name)}"
                time.sleep(0.1)

    # --- the kubelet ----------------------------------------------------------------------------------------------------
    def _start(
        self, name: str, template: Mapping[str, Any], env: Mapping[str, str], mounts: Mapping[str, Path]
    ) -> None:
        (container,) = template["spec"]["containers"]
        security = {**template["spec"]["securityContext"], **container["securityContext"]}
        assert security["runAsNonRoot"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        if name in self._roots:
            self.remove(name)
        root = self._roots[name] = self._stack.enter_context(self.image.container())[1]
        variables = {
            "PATH": "/opt/horovod_jobs/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOSTNAME": name,
            "HOME": "/home/jobs",
            **self._image_env(),
        }
        fields = {"metadata.name": name}
        for entry in container["env"]:
            value = entry["value"] if "value" in entry else fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
            variables[entry["name"]] = expanded(value, variables)
        variables |= env
        everything = {
            self.spec["sshAuthMountPath"]: self.directory / "ssh",
            **self._volumes(template, container),
            **mounts,
        }
        index = self.net.names.index(name)
        hosts = ["127.0.0.1 localhost", f"{self.net.addresses[index]} {self.fqdn(name)} {name}"]
        hosts += [
            f"{address} {self.fqdn(other)}"
            for other, address in zip(self.net.names, self.net.addresses, strict=True)
            if other in self.workers and other != name
        ]
        (self.directory / f"{name}.hosts").write_text("\n".join(hosts) + "\n")
        command = [expanded(word, variables) for word in (*container["command"], *container["args"])]
        user, group = str(security["runAsUser"]), str(security["runAsGroup"])
        lines = [
            f"mount --bind {root} {root}",
            f"mount -t proc proc {root}/proc",
            f"mount -t sysfs -o ro sysfs {root}/sys",
            f"mount -t tmpfs -o mode=755 tmpfs {root}/dev",
            f"for node in null zero random urandom full tty; do touch {root}/dev/$node; mount --bind /dev/$node {root}/dev/$node; done",
            f"mkdir -m 1777 {root}/dev/shm && mount -t tmpfs -o mode=1777 tmpfs {root}/dev/shm",
            f"mkdir {root}/dev/pts && mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts {root}/dev/pts",
            f"ln -s pts/ptmx {root}/dev/ptmx",
            f"ln -s /proc/self/fd {root}/dev/fd",
            f"touch {root}/etc/hosts && mount --bind {self.directory}/{name}.hosts {root}/etc/hosts",
            f"rm -f {root}/etc/resolv.conf && touch {root}/etc/resolv.conf",
        ]
        for target, source in sorted(everything.items()):
            lines.append(f"mkdir -p {root}{target} && mount --bind {source} {root}{target}")
        lines += [
            "ip link set lo up",
            # Only when the network is there: a kubelet starts no container before.
            f"touch {self.directory}/ready-{name}; while ! ip link show eth0 up 2>/dev/null | grep -q 'state UP'; do sleep 0.02; done",
            f"exec env -i {' '.join(shlex.quote(f'{key}={value}') for key, value in variables.items())} "
            f"chroot {root} setpriv --reuid {user} --regid {group} --groups {security['fsGroup']} --no-new-privs "
            f"--inh-caps=-all --bounding-set=-all --ambient-caps=-all env -C /home/jobs {shlex.join(command)}",
        ]
        (self.directory / f"{name}.sh").write_text("\n".join(lines) + "\n")
        self.net.hold(name, _POD)
        self.net.join(index)

    def _image_env(self) -> dict[str, str]:
        """The image's variables, which a container begins with."""
        config = json.loads(self.image.buildah("inspect", "--type", "image", self.image.tag))["OCIv1"]["config"]
        return dict(entry.split("=", 1) for entry in config["Env"])

    def _volumes(self, template: Mapping[str, Any], container: Mapping[str, Any]) -> dict[str, Path]:
        """Where the pod's volumes are here. Claims are shared by all pods; /dev/shm is the pod's own."""
        places = {}
        by_name = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
        for mount in container.get("volumeMounts", []):
            volume = by_name[mount["name"]]
            if "configMap" in volume:
                places[mount["mountPath"]] = self.directory / "config"
            elif "persistentVolumeClaim" in volume:
                places[mount["mountPath"]] = self.claims[volume["persistentVolumeClaim"]["claimName"]]
            elif mount["name"] == "data":
                places[mount["mountPath"]] = self.data
        return places

    def inside(
        self, name: str, argv: Sequence[str], *, shell: str = "", timeout_s: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a pod, as root, for the test's own questions."""
        command = [shell, *argv[1:]] if shell else list(argv)
        enter = [
            program("nsenter"),
            "-t",
            str(self.net._inside[name]),
            "--net",
            "--uts",
            "--ipc",
            "--pid",
            "--mount",
            "--root",
            *command,
        ]
        return subprocess.run(enter, capture_output=True, text=True, timeout=timeout_s, check=False)

    def wait(self, name: str, *, timeout_s: float) -> int:
        """The container's exit code."""
        try:
            return self._holding(name).wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} did not end within {timeout_s:g} s:\n{self.log(name)[-4000:]}") from None

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the pod's first process; SIGKILL is what a lost node or the memory limit comes to."""
        os.kill(self.net._inside[name], number)

    def remove(self, name: str) -> None:
        """What is left of a pod's container, before another takes its place."""
        holding = self._holding(name)
        end(holding)
        holding.wait()
        self.net._in("switch", "ip", "link", "del", f"port{self.net.names.index(name)}", check=False)
        (self.directory / f"ready-{name}").unlink(missing_ok=True)

    def _holding(self, name: str) -> subprocess.Popen[bytes]:
        """The process that ends with the pod's container; the latest of that name."""
        for one in reversed(self.net._holders):
            words = one.args
            assert isinstance(words, list)
            if words[-3] == name:
                return one
        raise KeyError(name)

    def log(self, name: str) -> str:
        """What the container printed."""
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def _made(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir()
        path.chmod(0o755)
        return path

    def close(self) -> None:
        """End every pod and give its files back."""
        self.net.close()
        self._stack.close()


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """``$(NAME)`` as the kubelet replaces it; ``$$(NAME)`` stays as ``$(NAME)``."""
    return re.sub(
        r"(\$?)\$\((\w+)\)", lambda found: found[0][1:] if found[1] else variables.get(found[2], found[0]), text
    )


@contextmanager
def job(text: str, *, image: Image, directory: Path, volumes: Mapping[str, Path], data: Path) -> Iterator[Job]:
    """The job with its workers running and its launcher not yet."""
    made = Job(text, image=image, directory=directory, volumes=volumes, data=data)
    try:
        made.prepare()
        for name in made.workers:
            made.start_worker(name)
        yield made
    finally:
        made.close()
