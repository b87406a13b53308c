"""A model that runs though it does not fit in memory: a layer's weights are there while it computes, and then no more.
Knows modules and where their parameters come from; not what the model is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from model.loader import SourceOf


class Streamed:
    """The parameters of a model on the meta device. Norms and other vectors are loaded at once, for modules take them
    from one another; a module with a matrix has its own while it is called (in `running`) or held (in `held`).
    """

    def __init__(self, model: nn.Module, source_of: SourceOf, on_load: Callable[[int], None]) -> None:
        """on_load: hears how many bytes were read."""
        self._source_of, self._on_load = source_of, on_load
        names = {id(meta): name for name, meta in reversed(list(model.named_parameters(remove_duplicate=False)))}
        self._own: dict[nn.Module, dict[str, tuple[str, nn.Parameter]]] = {}
        for module in model.modules():
            own = {key: (names[id(meta)], meta) for key, meta in module.named_parameters(recurse=False)}
            if any(meta.dim() > 1 for _, meta in own.values()):
                self._own[module] = own
            else:
                self._load(module, own)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model can be called."""
        hooks = []
        for module, own in self._own.items():
            hooks.append(module.register_forward_pre_hook(lambda module, args, own=own: self._load(module, own)))
            hooks.append(module.register_forward_hook(lambda module, args, output, own=own: _drop(module, own)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, own in self._own.items():  # an error may have left one that is loaded
                _drop(module, own)

    @contextmanager
    def held(self, module: nn.Module) -> Iterator[None]:
        """Inside, one module can be called as often as one likes."""
        self._load(module, self._own[module])
        try:
            yield
        finally:
            _drop(module, self._own[module])

    def _load(self, module: nn.Module, own: dict[str, tuple[str, nn.Parameter]]) -> None:
        for key, (name, meta) in own.items():
            parameter = nn.Parameter(self._source_of(name, meta).whole(), requires_grad=False)
            setattr(module, key, parameter)
            self._on_load(parameter.nbytes)


def _drop(module: nn.Module, own: dict[str, tuple[str, nn.Parameter]]) -> None:
    for key, (_, meta) in own.items():
        setattr(module, key, meta)
