"""The installed versions that decide a result."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["versions"]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """The versions of the packages that decide the result of a merge."""
    return {name: _installed(name) for name in ("varm-merge", "mergekit", "torch", "transformers", "safetensors")}
