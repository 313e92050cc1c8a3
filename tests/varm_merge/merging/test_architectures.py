"""Checks and merges of tiny models of many architectures of transformers.

``varm-merge check`` exits with 0 exactly when the merge does. A finished merge loads with no tensor missing or
unexpected; a refused one writes nothing and names ``--by-name``, which merges it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import architectures
import pytest
import runs
import torch
from click.testing import CliRunner, Result
from mergekit.scripts.run_yaml import main as mergekit_yaml
from transformers.utils import logging

from varm_merge.cli import main

pytestmark = pytest.mark.slow
OPTIONS = ("--quiet", "--no-copy-tokenizer")


@dataclass(frozen=True)
class Case:
    """A recipe, the tensors of its targets as transformers loads them, and what check and merge did with it."""

    recipe: Path
    targets: list[dict[str, torch.Tensor]]
    out: Path
    check: Result
    merge: Result


@pytest.fixture(scope="module", autouse=True)
def quiet_transformers() -> Iterator[None]:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture(scope="module", params=architectures.ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("family")
    family = architectures.save_family(request.param, folder)
    recipe, out = folder / "recipe.yaml", folder / "out"
    recipe.write_text(runs.recipe(family, "dtype: float32", granularity="layer"))
    targets = [architectures.load(target) for target in family.targets]
    assert not any(target.faults for target in targets)
    check = CliRunner().invoke(main, ["check", str(recipe)])
    merge = CliRunner().invoke(mergekit_yaml, [str(recipe), str(out), *OPTIONS])
    return Case(recipe, [target.tensors for target in targets], out, check, merge)


def assert_explained(result: Result) -> None:
    """The program ended by its own exit, whatever its code."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output


def assert_sound(merged: Path, targets: list[dict[str, torch.Tensor]]) -> None:
    """``merged`` loads completely, and each of its values lies between those of the targets."""
    found = architectures.load(merged)
    assert found.faults == {}
    assert found.tensors.keys() == targets[0].keys()
    for name, tensor in found.tensors.items():
        values = torch.stack([target[name] for target in targets]).double()
        slack = 1e-6 * values.abs().amax(0)
        assert (tensor >= values.amin(0) - slack).all(), name
        assert (tensor <= values.amax(0) + slack).all(), name


def test_check_passes_exactly_what_merges_and_loads(case: Case) -> None:
    assert_explained(case.check)
    assert_explained(case.merge)
    assert case.check.exit_code == case.merge.exit_code, case.check.output + case.merge.output
    if case.merge.exit_code == 0:
        assert_sound(case.out, case.targets)
    else:
        assert not case.out.exists()
        assert "--by-name" in case.check.output
        assert "--by-name" in case.merge.output


def test_every_one_merges_by_names(case: Case, tmp_path: Path) -> None:
    check = CliRunner().invoke(main, ["check", "--by-name", str(case.recipe)])
    assert_explained(check)
    assert check.exit_code == 0, check.output
    merge = CliRunner().invoke(main, ["yaml", "--by-name", str(case.recipe), str(tmp_path / "out"), *OPTIONS])
    assert_explained(merge)
    assert merge.exit_code == 0, merge.output
    assert_sound(tmp_path / "out", case.targets)
