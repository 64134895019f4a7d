"""Register Blueberry with transformers' Auto classes, without paying for transformers before it is used.

Importing models takes seconds, so registration waits until something imports transformers' Auto modules or Blueberry's
own models: an import hook for each, removed once it has fired. For modules that are already there it happens at once.
Blueberry's models need transformers' layers, which import the Auto modules halfway: if they come first, registration
waits until they are complete.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_CONFIG_AUTO = "transformers.models.auto.configuration_auto"
_MODEL_AUTO = "transformers.models.auto.modeling_auto"
_LAYERS = "transformers.modeling_layers"
_MODELS = "blueberry.modeling_blueberry"

_loading: set[str] = set()  # hooked modules whose code is running


def _register_config() -> None:
    from .configuration_blueberry import BlueberryConfig

    auto = import_module(_CONFIG_AUTO)
    auto.AutoConfig.register("blueberry", BlueberryConfig, exist_ok=True)


def _register_models() -> None:
    from .configuration_blueberry import BlueberryConfig

    auto, models = import_module(_MODEL_AUTO), import_module(_MODELS)
    auto.AutoModel.register(BlueberryConfig, models.BlueberryModel, exist_ok=True)
    auto.AutoModelForCausalLM.register(BlueberryConfig, models.BlueberryForCausalLM, exist_ok=True)
    auto.AutoModelForSequenceClassification.register(
        BlueberryConfig, models.BlueberryForSequenceClassification, exist_ok=True
    )


def _load_models() -> None:
    """Load Blueberry's models, which registers them, unless it is they, or the layers, who are loading this."""
    if not _loading & {_LAYERS, _MODELS}:
        import_module(_MODELS)


_AFTER_IMPORT: dict[str, Callable[[], None]] = {
    _CONFIG_AUTO: _register_config,
    _MODEL_AUTO: _load_models,
    _LAYERS: _load_models,
    _MODELS: _register_models,
}


class _RunAfterImport(MetaPathFinder):
    """Finds one module as Python would, and calls a function once the module's code has run."""

    def __init__(self, name: str, then: Callable[[], None]):
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        run_module = spec.loader.exec_module

        def run_module_and_then(module: ModuleType) -> None:
            _loading.add(self.name)
            try:
                run_module(module)
            finally:
                _loading.remove(self.name)
            self.then()

        spec.loader.exec_module = run_module_and_then
        return spec


def register_when_used() -> None:
    """Register with each of transformers' Auto modules: now if it is loaded, else as soon as it is."""
    for name, then in _AFTER_IMPORT.items():
        if name in sys.modules:
            then()
        else:
            sys.meta_path.insert(0, _RunAfterImport(name, then))
