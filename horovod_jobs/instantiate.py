"""Build objects from ``_target_`` nodes. A config file is data from somebody; only allowed names may run code.

Allowed are this package's modules, torch's building blocks (not ``torch.load`` or ``torch.hub``), and the prefixes that the
user names in ``allow_targets``.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from horovod_jobs.errors import ConfigError, JobError

PACKAGE_PREFIXES = ("horovod_jobs", "torch.nn", "torch.optim", "torch.utils.data")


def is_node(value: Any) -> bool:
    """Whether a config value names something to build."""
    return isinstance(value, Mapping) and "_target_" in value


def _check_allowed(target: str, allow: Sequence[str]) -> None:
    if not isinstance(target, str) or not all(part.isidentifier() for part in str(target).split(".")):
        raise ConfigError(f"_target_={target!r} is not a dotted Python name; write package.module.Class")
    if not any(target == prefix or target.startswith(prefix + ".") for prefix in (*PACKAGE_PREFIXES, *allow)):
        prefix = target.split(".")[0]
        raise ConfigError(
            f"_target_={target} is not allowed (allowed: {', '.join((*PACKAGE_PREFIXES, *allow))}); "
            f"if you trust that code, add it: allow_targets=[{prefix}]"
        )


def locate(target: str, *, allow: Sequence[str] = ()) -> Callable[..., Any]:
    """The class or function with this dotted name.

    Raises:
        ConfigError: the name is not allowed, or there is no such thing.
    """
    _check_allowed(target, allow)
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
                continue
            raise ConfigError(f"_target_={target}: importing {module_name} needs {error.name}; install it") from error
        for position, part in enumerate(parts[length:], start=length):
            if not hasattr(found, part):
                where = ".".join(parts[:position])
                raise ConfigError(f"_target_={target}: {where} has no {part!r}; check the spelling")
            found = getattr(found, part)
        # torch.nn.os.system would pass the prefix test: what is found must be defined where it is allowed to be.
        home = getattr(found, "__module__", None)
        if not callable(found):
            raise ConfigError(f"_target_={target} is not a class or a function ({type(found).__name__}); name one")
        _check_allowed(f"{home}.{parts[-1]}" if home else target, allow)
        return found  # type: ignore[no-any-return]
    raise ConfigError(
        f"_target_={target}: no module named {parts[0]!r}; check the spelling, or put its directory on PYTHONPATH"
    )


def bind(node: Mapping[str, Any], *, where: str, allow: Sequence[str] = (), injected: Iterable[str] = ()) -> None:
    """Check a node's names against the signature, nested nodes too, before anything is built.

    Raises:
        ConfigError: an unknown or missing argument (the message names it and those there are).
    """
    if not is_node(node):
        raise ConfigError(f"{where} names nothing to build ({_short(node)}); give it a _target_")
    fn = locate(node["_target_"], allow=allow)
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    for key, value in arguments.items():
        if is_node(value):
            bind(value, where=f"{where}.{key}", allow=allow)
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return  # Some classes written in C have no signature; building them says what is wrong.
    injected = list(injected)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    names = [name for name in parameters if name not in injected and name != "self"]
    if not takes_any:
        for key in arguments:
            if key not in parameters:
                raise ConfigError(
                    f"{where}.{key}={_short(arguments[key])}: {node['_target_']} has no argument {key!r}; "
                    f"it takes {', '.join(names) or 'none'}"
                )
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind in (
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        )
        if required and name not in arguments and name not in injected and name != "self":
            raise ConfigError(f"{where}.{name} is missing; {node['_target_']} needs it")


def instantiate(node: Mapping[str, Any], *, allow: Sequence[str] = (), where: str = "config", **injected: Any) -> Any:
    """Build what a node names. Nested nodes are built first; ``injected`` arguments fill in what the node does not say.

    Raises:
        ConfigError: not allowed, not there, or its arguments do not fit.
    """
    bind(node, where=where, allow=allow, injected=injected)
    arguments = {
        key: _build(value, allow=allow, where=f"{where}.{key}") for key, value in node.items() if key != "_target_"
    }
    try:
        return locate(node["_target_"], allow=allow)(**{**injected, **arguments})
    except JobError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {node['_target_']} refused its arguments ({error}); mend them") from error


def _build(value: Any, *, allow: Sequence[str], where: str) -> Any:
    if is_node(value):
        return instantiate(value, allow=allow, where=where)
    if isinstance(value, Mapping):
        return {key: _build(item, allow=allow, where=f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_build(item, allow=allow, where=f"{where}[{index}]") for index, item in enumerate(value)]
    return value


def accepted(node: Mapping[str, Any], offered: Mapping[str, Any], *, allow: Sequence[str] = ()) -> dict[str, Any]:
    """Those of the offered arguments that the node's class takes: a model of yours need not know ``input_shape``."""
    try:
        parameters = inspect.signature(locate(node["_target_"], allow=allow)).parameters
    except ValueError:
        return {}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {key: value for key, value in offered.items() if takes_any or key in parameters}


def targets_in(value: Any) -> list[str]:
    """Every ``_target_`` in a config value, sorted."""
    found: set[str] = set()
    if isinstance(value, Mapping):
        if is_node(value):
            found.add(str(value["_target_"]))
        for item in value.values():
            found.update(targets_in(item))
    elif isinstance(value, list | tuple):
        for item in value:
            found.update(targets_in(item))
    return sorted(found)


def code_digests(value: Any, *, allow: Sequence[str] = ()) -> dict[str, str]:
    """SHA-256 of the source file of each ``_target_`` outside torch, so that an edited model is not mistaken for the old one.

    Raises:
        ConfigError: a target is not allowed or not there.
    """
    digests = {}
    for target in targets_in(value):
        fn = locate(target, allow=allow)
        if not target.startswith("torch."):
            digests[target] = _source_digest(inspect.getsourcefile(inspect.unwrap(fn)) or "")
    return digests


@lru_cache(maxsize=256)
def _source_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path else "built-in"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
