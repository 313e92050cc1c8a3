"""The installed versions that decide a result."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["installed", "versions"]


def installed(package: str) -> str:
    """The version of a package, or ``not installed``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """The versions of the packages that decide the result of a merge."""
    return {name: installed(name) for name in ("varm-merge", "mergekit", "torch", "transformers", "safetensors")}
