"""How mergekit's own commands come to know the methods.

mergekit 0.1.5 has no plug-in discovery. A `.pth` file in site-packages calls `install` when an
interpreter starts; that puts one object on ``sys.meta_path`` and loads nothing else. When one of
the modules in `_EXTENSIONS` is imported for the first time, its extension runs right after the
module's own code; those in `_LATE` import some things when they are used (`mergekit_ext.late`).
``MERGEKIT_EXT_AUTOLOAD=0`` switches this off; so does uninstalling the package.
"""

# `sys` is loaded already. Nothing else is imported here: every Python process of the environment
# pays for it.
import sys

_EXTENSIONS = {
    "mergekit.architecture.auto": "extend_inference",
    "mergekit.merge_methods": "extend_methods",
    "mergekit.plan": "extend_planner",
    "mergekit.merge": "extend_merge",
    "mergekit.scripts.multimerge": "extend_multimerge",
    "mergekit.scripts.run_yaml": "extend_yaml",
}
# Module -> what it imports late: modules, and their objects ("" is the module itself).
_LATE: dict[str, dict[str, tuple[str, ...]]] = {
    "mergekit.architecture": {"mergekit.architecture.auto": ("infer_architecture_info",)},
    # The class is named by annotations only.
    "mergekit.common": {"peft": ("",), "transformers": ("", "PreTrainedModel")},
    "mergekit.io.lazy_unpickle": {"accelerate": ("",)},
    "mergekit.io.tasks": {"mergekit.architecture.conversion": ("convert_checkpoint_tensors",)},
}


def _extend(name: str, module) -> None:  # type: ignore[no-untyped-def]
    from mergekit_ext.host import patches

    getattr(patches, _EXTENSIONS[name])(module)


def _is_executing(name: str) -> bool:
    return getattr(sys.modules[name].__spec__, "_initializing", False)


def _execute(name: str, module, execute) -> None:  # type: ignore[no-untyped-def]
    if name not in _LATE:
        execute(module)
        return
    from mergekit_ext.late import late_imports

    with late_imports(module, _LATE[name]):
        execute(module)


class _Finder:
    """Finds nothing itself: lets the other finders find a module, then wraps its execution."""

    def __init__(self, names) -> None:  # type: ignore[no-untyped-def]
        self.pending = set(names)
        self._searching = set()  # type: ignore[var-annotated]

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in self.pending or name in self._searching:
            return None
        self._searching.add(name)
        try:
            for finder in sys.meta_path:
                find = getattr(finder, "find_spec", None)
                spec = find(name, path, target) if find is not None else None
                if spec is not None and spec.loader is not None:
                    self._extend_after(spec.loader, name)
                    return spec
        finally:
            self._searching.discard(name)
        return None

    def _extend_after(self, loader, name: str) -> None:  # type: ignore[no-untyped-def]
        execute = loader.exec_module

        def exec_module(module) -> None:  # type: ignore[no-untyped-def]
            # One loader may serve many modules (those of a zip file), and a probe may have found
            # the module before without importing it.
            if module.__name__ != name or name not in self.pending:
                execute(module)
                return
            _execute(name, module, execute)
            self.pending.discard(name)
            if not self.pending:
                sys.meta_path.remove(self)
            # What its package imports is extended with `mergekit.merge_methods`: ours needs both.
            if name in _EXTENSIONS and not _is_executing(name.rpartition(".")[0]):
                _extend(name, module)

        loader.exec_module = exec_module


def install() -> None:
    """Extend the modules that are loaded, and wait for the others. Idempotent."""
    waiting = any(isinstance(finder, _Finder) for finder in sys.meta_path)
    found = {name: sys.modules.get(name) for name in _EXTENSIONS}
    loaded = {name: m for name, m in found.items() if m is not None and not _is_executing(name)}
    if not waiting and len(loaded) < len(_EXTENSIONS):
        late = _LATE.keys() - sys.modules.keys()
        sys.meta_path.insert(0, _Finder((_EXTENSIONS.keys() - loaded.keys()) | late))
    for name, module in loaded.items():
        _extend(name, module)
