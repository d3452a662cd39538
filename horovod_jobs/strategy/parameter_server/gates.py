"""Forward passes that wait for their own parameters only: each module's just before it runs, in the order of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Gates:
    """Hooks on the modules of a model. ``fetch`` waits for parameters by their numbers.

    Not every module reads its parameters in its own forward pass: attention reads its projection's weights without calling it, and a
    model may reach into a part of it. So the first pass is watched: a parameter that any operation reads before its module is entered
    is fetched at the beginning of every pass. A model that is compiled gets everything at the beginning.

    ``seen`` is told once the order in which that pass needed the parameters, which need not be the order in which the model was made.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[Tensor], *, fetch: Callable[[Sequence[int]], None],
        seen: Callable[[Sequence[int]], None],
    ) -> None:  # fmt: skip
        self._fetch, self._seen = fetch, seen
        number = {id(parameter): index for index, parameter in enumerate(parameters)}
        everything = list(range(len(parameters)))
        self._first: list[int] = everything  # fetched when the model is called
        self._watch: _Watch | None = None
        self._hooks: list[Any] = []
        compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
        self._watched = compiled
        self._own: dict[nn.Module, list[int]] = {}
        if not compiled:
            for module in model.modules():
                own = [
                    number[id(parameter)] for parameter in module.parameters(recurse=False) if id(parameter) in number
                ]
                if own:
                    self._own[module] = own
                    self._hooks.append(module.register_forward_pre_hook(self._enter))
        # The model's own hook runs before those of its parts.
        self._hooks.append(model.register_forward_pre_hook(self._begin, prepend=True))
        self._hooks.append(model.register_forward_hook(self._end, always_call=True))
        self._storages = {parameter.untyped_storage().data_ptr(): index for index, parameter in enumerate(parameters)}

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._fetch(self._first)
        if not self._watched and self._watch is None:
            self._watch = _Watch(self._storages)
            self._watch.__enter__()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if self._watch is not None:
            self._watch.entered.update(dict.fromkeys(self._own[module]))
        self._fetch(self._own[module])

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._watch is None:
            return
        watch, self._watch = self._watch, None
        watch.__exit__(None, None, None)
        self._watched = True
        late = [index for index in watch.entered if index not in watch.early]
        first = [index for index in self._first if index not in set(late)]
        # What is waited for at the beginning is the most urgent; of it, what is read first.
        self._first = sorted(first, key=lambda index: watch.early.get(index, len(watch.early)))
        self._seen([*self._first, *late])

    @property
    def at_the_beginning(self) -> int:
        """How many parameters are waited for when the model is called."""
        return len(self._first)

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


class _Watch(TorchDispatchMode):
    """Notes which parameters an operation reads before their module was entered. Views share a parameter's storage."""

    def __init__(self, storages: dict[int, int]) -> None:
        super().__init__()
        self._storages = storages
        self.entered: dict[int, None] = {}  # in this order
        self.early: dict[int, int] = {}  # with the place in their order

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, torch.Tensor):
                index = self._storages.get(leaf.untyped_storage().data_ptr())
                if index is not None and index not in self.entered:
                    self.early.setdefault(index, len(self.early))
        return func(*args, **(kwargs or {}))
