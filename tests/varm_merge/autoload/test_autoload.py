"""Stock mergekit sees ``varm`` in an environment that has varm-merge, and nothing else there notices.

The environments are real: a fresh venv each, the wheel or the editable install made by pip, mergekit's own
console script run by that venv's interpreter. Only mergekit and torch themselves are borrowed from the
environment of the tests, by a path line, so that nothing is downloaded.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import _varm_merge_autoload as autoload
import pytest
import runs
from tiny_models import Family

PROJECT = Path(__file__).parents[3]
SCRIPTS = Path(sys.executable).parent
FINDER = "any(type(f).__name__ == 'VarmMergeFinder' for f in sys.meta_path)"
SEES_VARM = (
    "import mergekit.merge_methods as m; print('varm' in [method.spec.name for method in m.registered_methods()])"
)
OFF = {"VARM_MERGE_AUTOLOAD": "0"}


@dataclass(frozen=True)
class Environment:
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def pip(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", *arguments]
        subprocess.run([str(part) for part in command], check=True, capture_output=True, cwd=self.folder)

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        clean = {
            key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VARM_MERGE_AUTOLOAD")
        }
        return subprocess.run(
            [str(part) for part in (self.python, *arguments)],
            cwd=self.folder,
            env={**clean, "PATH": f"{self.python.parent}:{clean['PATH']}", **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    def says(self, code: str, **variables: str) -> str:
        done = self.run("-c", code, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def fresh_environment(folder: Path) -> Environment:
    venv.create(folder, with_pip=False, symlinks=True)
    environment = Environment(folder)
    borrowed = environment.site_packages / "borrowed.pth"
    borrowed.write_text(f"{sysconfig.get_paths()['purelib']}\n")  # path lines only: its start-up files do not run
    return environment


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", out, PROJECT], check=True)
    return next(out.glob("*.whl"))


INSTALL = ("install", "--no-deps", "--no-index", "--quiet", "--ignore-installed")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = fresh_environment(tmp_path_factory.mktemp("wheel") / "env")
    environment.pip(*INSTALL, wheel)
    return environment


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = fresh_environment(tmp_path_factory.mktemp("editable") / "env")
    environment.pip(*INSTALL, "--no-build-isolation", "-e", PROJECT)
    return environment


@pytest.fixture(scope="module", params=["installed", "editable"])
def either(request: pytest.FixtureRequest) -> Environment:
    environment: Environment = request.getfixturevalue(request.param)
    return environment


# The hook by itself


def test_the_hook_is_there_once_and_leaves_when_all_modules_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not is_ours(finder)])
    monkeypatch.setattr(autoload, "WATCHED", ("colorsys", "this_module_is_missing"))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    reported: list[str] = []
    monkeypatch.setattr(autoload, "_report", lambda module: reported.append(module.__name__))
    autoload.start()
    autoload.start()
    (finder,) = filter(is_ours, sys.meta_path)
    finder.waiting.discard("this_module_is_missing")
    import colorsys

    assert reported == ["colorsys"]
    assert "exec_module" not in vars(colorsys.__loader__)
    assert not any(map(is_ours, sys.meta_path))


def is_ours(finder: object) -> bool:
    return type(finder).__name__ == "VarmMergeFinder"


def test_the_hook_is_not_installed_where_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not is_ours(finder)])
    monkeypatch.setenv("VARM_MERGE_AUTOLOAD", "0")
    autoload.start()
    assert not any(map(is_ours, sys.meta_path))


# Installed


@pytest.mark.slow
def test_stock_mergekit_yaml_merges_by_varm(installed: Environment, mistral: Family, tmp_path: Path) -> None:
    """The golden run: at layer granularity, so that the hook, the method and the planning all have to be there."""
    text = runs.recipe(mistral, granularity="layer")
    (tmp_path / "recipe.yaml").write_text(text)
    done = installed.run(
        SCRIPTS / "mergekit-yaml", tmp_path / "recipe.yaml", tmp_path / "out", "--no-copy-tokenizer"
    )
    assert done.returncode == 0, done.stderr
    here = runs.merge(text, tmp_path / "here")
    for name in ("model.safetensors", "varm_weights.json"):
        assert (tmp_path / "out" / name).read_bytes() == (here.folder / name).read_bytes()


@pytest.mark.slow
def test_importing_the_package_registers_where_the_hook_is_off(editable: Environment) -> None:
    sees = SEES_VARM.split("; ")[1]
    assert editable.says(f"{SEES_VARM}; import varm_merge; {sees}", **OFF).split() == ["False", "True"]


@pytest.mark.slow
def test_varm_merge_yaml_works_where_the_hook_is_off(
    installed: Environment, mistral: Family, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(runs.recipe(mistral, granularity="module"))
    done = installed.run(
        *(installed.python.parent / "varm-merge", "yaml", tmp_path / "recipe.yaml", tmp_path / "out"),
        *("--no-copy-tokenizer", "--quiet"),
        **OFF,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "varm_weights.json").exists()


@pytest.mark.slow
def test_a_python_without_mergekit_pays_for_one_small_module(either: Environment) -> None:
    code = f"import sys; print({FINDER}, sorted(m for m in sys.modules if 'varm' in m or 'mergekit' in m))"
    assert either.says(code) == "True ['_varm_merge_autoload']"
    assert either.says(f"import sys; print({FINDER})", **OFF) == "False"


@pytest.mark.slow
def test_the_hook_imports_nothing_a_bare_python_has_not(either: Environment) -> None:
    loaded = "import sys; before = set(sys.modules); import _varm_merge_autoload as a; a.start(); " + (
        "print(sorted(set(sys.modules) - before - {'_varm_merge_autoload'}))"
    )
    done = either.run(
        "-S", "-c", f"import sys; sys.path.insert(0, {str(either.site_packages)!r}); import os; {loaded}"
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_the_hook_never_raises(installed: Environment) -> None:
    """A package that is half gone must not keep any Python from starting, nor mergekit from importing."""
    broken = "import sys; sys.modules['varm_merge'] = None; import mergekit.merge_methods; print('alive')"
    done = installed.run("-c", broken)
    assert done.stdout.strip() == "alive", done.stderr
    assert "varm-merge could not attach to mergekit" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_start_up_files_of_old_and_new_pythons_agree(either: Environment) -> None:
    """Python ≥ 3.15 calls the entry point of a ``.start`` file instead of the ``import`` line (PEP 829)."""
    pth = (either.site_packages / "varm_merge_autoload.pth").read_text()
    start = (either.site_packages / "varm_merge_autoload.start").read_text().split()
    assert pth == "import _varm_merge_autoload; _varm_merge_autoload.start()\n"
    assert start == ["_varm_merge_autoload:start"]
    code = f"import sys, pkgutil; pkgutil.resolve_name({start[0]!r})(); print({FINDER})"
    assert either.says(code) == "True"


@pytest.mark.slow
def test_doctor_finds_everything_in_order(installed: Environment) -> None:
    script = installed.python.parent / "mergekit-yaml"
    script.write_text(f"#!{installed.python}\n")
    script.chmod(0o755)
    done = installed.run(installed.python.parent / "varm-merge", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(installed.site_packages / "_varm_merge_autoload.py") in done.stdout
    assert "stock mergekit-yaml sees `merge_method: varm`" in done.stdout


@pytest.mark.slow
def test_doctor_says_what_to_do(installed: Environment, tmp_path: Path) -> None:
    (tmp_path / "mergekit-yaml").write_text("#!/bin/sh\n")
    (tmp_path / "mergekit-yaml").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    off = installed.run(installed.python.parent / "varm-merge", "doctor", PATH=path, **OFF)
    assert off.returncode == 1
    assert "VARM_MERGE_AUTOLOAD=0. Unset it." in off.stdout
    assert "that of another environment" in off.stdout
    pth = installed.site_packages / "varm_merge_autoload.pth"
    moved = pth.rename(tmp_path / pth.name)
    gone = installed.run(installed.python.parent / "varm-merge", "doctor")
    moved.rename(pth)
    assert (gone.returncode, "no start-up file was read. Reinstall" in gone.stdout) == (1, True)


@pytest.mark.slow
def test_uninstalling_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    environment = fresh_environment(tmp_path / "env")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    environment.pip(*INSTALL, wheel)
    assert environment.says(f"import sys; print({FINDER})") == "True"
    environment.pip("uninstall", "--yes", "varm-merge")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


# In a Python that has not imported mergekit

FORKING = """
import os, sys
import accelerate, click, huggingface_hub, networkx, peft, pydantic, safetensors.torch, torch, transformers, yaml
from transformers import AutoConfig, AutoTokenizer, MistralConfig, PreTrainedModel

assert not any("mergekit" in name or "varm" in name for name in sys.modules if name != "_varm_merge_autoload")
print("ready", flush=True)
while code := sys.stdin.readline():
    child = os.fork()
    if not child:
        exec(eval(code), {})
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable[[str], str]]:
    """Runs code in a fork of a Python that has imported torch and transformers, and neither mergekit nor varm."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **OFF},
    )
    assert process.stdin
    assert process.stdout
    lines = iter(process.stdout.readline, "")
    assert "ready\n" in lines

    def run(code: str) -> str:
        assert process.stdin
        process.stdin.write(f"{code!r}\n")
        process.stdin.flush()
        return "".join(iter(lines.__next__, "done\n"))

    yield run
    process.stdin.close()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "merging.method",
        "recipes.check",
        "merging.attach",
        "merging.tasks",
        "merging.weight_log",
        "cli",
        "merging.weights",
    ],
)
def test_any_module_of_the_package_may_be_imported_first(module: str, fresh: Callable[[str], str]) -> None:
    code = f"import varm_merge.{module}; import mergekit.merge; mergekit.merge.run_merge.__wrapped__; {SEES_VARM}"
    assert fresh(code) == "True\n"


@pytest.mark.slow
def test_looking_for_mergekit_without_importing_it_does_not_spend_the_hook(fresh: Callable[[str], str]) -> None:
    find = "import varm_merge, importlib.util; importlib.util.find_spec('mergekit.merge_methods')"
    assert fresh(f"{find}; {SEES_VARM}") == "True\n"


@pytest.mark.slow
def test_each_module_of_mergekit_is_attached_to_once(fresh: Callable[[str], str]) -> None:
    code = f"""
import sys, varm_merge, _varm_merge_autoload as a
import mergekit.scripts.run_yaml, mergekit.scripts.multimerge, mergekit.scripts.merge_raw_pytorch
print({FINDER})
import mergekit.merge
a.start(); a.install()
wrapped = mergekit.merge.run_merge.__wrapped__
print(wrapped.__module__, hasattr(wrapped, "__wrapped__"))
"""
    assert fresh(code).splitlines() == ["False", "mergekit.merge False"]


@pytest.mark.slow
def test_an_unknown_mergekit_is_refused_with_the_versions_that_work(
    fresh: Callable[[str], str], mistral: Family, tmp_path: Path
) -> None:
    """mergekit with its planner changed under us: one sentence, no traceback, no merge."""
    (tmp_path / "recipe.yaml").write_text(runs.recipe(mistral))
    code = f"""
import sys, varm_merge, _varm_merge_autoload as a
a.uninstall()
import mergekit.plan
del mergekit.plan.MergePlanner._out_module_arch
a.install()
from mergekit.scripts.run_yaml import main
try:
    main([{str(tmp_path / "recipe.yaml")!r}, {str(tmp_path / "out")!r}])
except SystemExit as end:
    print("ends with", end.code)
"""
    output = fresh(code)
    assert "works with mergekit >=0.1.5,<0.2, and mergekit.plan of the installed mergekit" in output
    assert "ends with 1" in output
    assert "Traceback" not in output
