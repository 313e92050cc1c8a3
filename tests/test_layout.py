"""The tree: what may import what, where files lie."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("varm_common", "varm_merge", "fusion_trainer")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}


def imports(path: Path) -> Iterator[str]:
    """Every module of ours that a file imports, anywhere in it, or names in a string of its own."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [member if member in FILES else node.module for member in members]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            names = [node.value]
        yield from (name for name in names if name in FILES)


GRAPH = {module: set(imports(path)) - {module} for module, path in FILES.items()}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of some circle, in order; none if there is none."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module not in done:
            for other in sorted(graph.get(module, ())):
                if found := follow(other, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := follow(module, []))), [])


def test_no_module_imports_itself_through_others() -> None:
    assert cycle(GRAPH) == []


def test_a_circle_would_be_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


@pytest.mark.parametrize(
    ("package", "others"),
    [
        ("varm_common", ("varm_merge", "fusion_trainer")),
        ("varm_merge", ("fusion_trainer",)),
        ("fusion_trainer", ("varm_merge",)),
    ],
)
def test_packages_keep_apart(package: str, others: tuple[str, ...]) -> None:
    crossing = {
        (module, imported)
        for module, names in GRAPH.items()
        for imported in names
        if module.split(".")[0] == package and imported.split(".")[0] in others
    }
    assert crossing == set()


def test_only_the_entrances_lie_in_a_package_s_root() -> None:
    allowed = {"__init__.py", "__main__.py", "cli.py", "config.py", "version.py"}
    flat = {
        str(p.relative_to(ROOT))
        for name in PACKAGES[1:]
        for p in (ROOT / name).glob("*.py")
        if p.name not in allowed
    }
    assert flat == set()


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_file_and_its_functions_fit_in_the_head(module: str) -> None:
    text = FILES[module].read_text(encoding="utf-8")
    assert text.count("\n") <= 450
    functions = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > 60] == []
