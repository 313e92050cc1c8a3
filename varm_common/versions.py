"""The installed versions that decide a result."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """The versions of the packages that decide a merge's result."""
    found = {}
    for package in ("varm-merge", "mergekit", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
