"""``check --offline`` and ``--help`` import no torch, and mergekit's rules are the same without it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mergekit import merge_methods

import varm_merge.merging.method  # noqa: F401  registers varm
from varm_merge.recipes.check import check

SHIPPED = sorted((Path(__file__).parents[3] / "yaml_recipes").glob("*.yaml"))
WRONG = """\
merge_method: ties
base_modle: org/p
models:
  - model: org/a
    parameters: {weight: 0.5, densty: 0.3, normalize: true}
  - model: [1]
slices: []
parameters: {lambda: x, int8_mask: 3, weight: [{filter: mlp, value: 1e-3}, {filter: 5}]}
dtype: blah
"""
TEXTS = {
    **{path.stem: path.read_text(encoding="utf-8") for path in SHIPPED},
    "wrong": WRONG,
    "empty": "",
    "swapped letters": "merge_method: vram\nmodels: 7\n",
    "layers": "merge_method: varm\nbase_model: a\nslices: [{sources: [{model: a, layer_range: [2, 1]}]}]\n",
}
WITHOUT_TORCH = """
import json, sys
from varm_merge.recipes.light_import import import_mergekit
import_mergekit()
from test_light_import import problems, rules
real = hasattr(sys.modules["torch"], "__version__")
print(json.dumps({"rules": rules(), "problems": problems(), "torch": real}))
"""
HELP = """
import sys
from click.testing import CliRunner
from varm_merge.cli import main
assert CliRunner().invoke(main, ["--help"]).exit_code == 0
large = ("torch", "mergekit", "numpy", "pydantic", "yaml", "huggingface_hub")
print([name for name in large if name in sys.modules])
"""


def rules() -> list[Any]:
    """mergekit's description of every method, as data."""
    specs = [method.spec for method in merge_methods.registered_methods()]
    return [
        [
            spec.name,
            [
                [
                    one.name,
                    one.scope.value,
                    str(one.value_type),
                    one.required,
                    None if one.required else one.default,
                ]
                for one in spec.parameters
            ],
            str(spec.contract),
        ]
        for spec in specs
    ]


def problems() -> dict[str, list[list[Any]]]:
    return {
        name: [[one.line, one.message] for one in check(text, every=True, models=False)]
        for name, text in TEXTS.items()
    }


def printed(script: str, **environment: str) -> str:
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_without_torch_rules_and_problems_are_mergekits_own() -> None:
    report = json.loads(printed(WITHOUT_TORCH))
    assert report["torch"] is False
    assert report["rules"] == json.loads(json.dumps(rules()))
    assert report["problems"] == json.loads(json.dumps(problems()))
    assert [name for name, found in report["problems"].items() if found] == [*TEXTS][len(SHIPPED) :]


@pytest.mark.slow
def test_a_mergekit_that_needs_torch_is_imported_with_it() -> None:
    """It asks the stand-in for torch for something that is not there: here, its version."""
    script = f"""
import importlib.util, sys
from importlib.machinery import SourceFileLoader
class Later(SourceFileLoader):
    def get_code(self, name):
        return compile("import torch; torch.__version__\\n" + self.get_data(self.path).decode(), self.path, "exec")
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mergekit.merge_methods":
            file = {merge_methods.__file__!r}
            return importlib.util.spec_from_file_location(name, file, loader=Later(name, file))
sys.meta_path.insert(0, Finder())
{WITHOUT_TORCH}
"""
    report = json.loads(printed(script))
    assert report["torch"] is True
    assert report["problems"] == json.loads(json.dumps(problems()))


@pytest.mark.slow
def test_help_imports_nothing_large() -> None:
    assert printed(HELP) == "[]\n"
