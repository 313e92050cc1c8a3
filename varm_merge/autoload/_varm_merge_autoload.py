"""Makes stock mergekit see ``varm``: a post-import hook that waits for mergekit and then removes itself.

Installed as a top-level module beside the start-up files ``varm_merge_autoload.pth`` and
``varm_merge_autoload.start`` (Python ≥ 3.15), which call ``start``. Every Python of the environment loads this
file, so it imports nothing but ``sys``, not even the ``varm_merge`` package. It never raises: an error here must
not break a Python that has nothing to do with merging.
"""

import sys

WATCHED = (
    "mergekit.merge_methods",
    "mergekit.plan",
    "mergekit.merge",
    "mergekit.scripts.run_yaml",
    "mergekit.scripts.multimerge",
    "mergekit.scripts.merge_raw_pytorch",
)
"""Modules of mergekit that the plugin attaches to when they have been loaded."""


class VarmMergeFinder:
    """A meta path finder that leaves the finding to the others and reports a watched module once it is loaded."""

    def __init__(self, names: "list[str]") -> None:
        self.waiting = set(names)

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name not in self.waiting:
            return None
        for finder in list(sys.meta_path):
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:  # type: ignore[arg-type]
                self._report_when_loaded(spec.loader)
                return spec
        return None

    def _report_when_loaded(self, loader: object) -> None:
        exec_module = loader.exec_module  # type: ignore[attr-defined]

        def exec_then_report(module: object) -> None:
            try:
                exec_module(module)
            finally:
                del loader.exec_module  # type: ignore[attr-defined]
            self.waiting.discard(module.__name__)  # type: ignore[attr-defined]
            if not self.waiting:
                uninstall()
            _report(module)

        loader.exec_module = exec_then_report  # type: ignore[attr-defined]


def start() -> None:
    """Install the hook at the start of a Python, unless ``VARM_MERGE_AUTOLOAD=0``."""
    try:
        import os  # loaded by site already

        if os.environ.get("VARM_MERGE_AUTOLOAD") != "0":
            install()
    except Exception:  # a start-up file that raises would print a traceback in every Python
        return


def install() -> None:
    """Install the hook, once; modules of mergekit that are loaded already are reported now."""
    if any(isinstance(finder, VarmMergeFinder) for finder in sys.meta_path):
        return
    loaded = [sys.modules[name] for name in WATCHED if name in sys.modules]
    missing = [name for name in WATCHED if name not in sys.modules]
    if missing:
        sys.meta_path.insert(0, VarmMergeFinder(missing))  # type: ignore[arg-type]
    for module in loaded:
        if not getattr(module.__spec__, "_initializing", False):
            _report(module)


def uninstall() -> None:
    """Take the hook out of the import system again."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, VarmMergeFinder)]


def _report(module: object) -> None:
    try:
        if module.__name__ == "mergekit.merge_methods":  # type: ignore[attr-defined]
            import varm_merge.merging.method  # noqa: F401  registers the method
        else:
            from varm_merge.merging import attach

            attach.attach(module)  # type: ignore[arg-type]
    except Exception as error:
        reason = f"varm-merge could not attach to mergekit ({type(error).__name__}: {error})."
        print(f"{reason} Run `varm-merge doctor`.", file=sys.stderr)
        method = sys.modules.get("varm_merge.merging.method")
        if hasattr(method, "refuse"):
            method.refuse(reason)  # type: ignore[union-attr]
