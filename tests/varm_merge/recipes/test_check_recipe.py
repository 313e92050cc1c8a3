"""A varm recipe with mistakes is refused before any weight is read: every mistake at once, each with its line."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import yaml
from click.testing import CliRunner
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts import merge_raw_pytorch, multimerge, run_yaml
from tiny_models import Family

from varm_common.errors import UserError
from varm_merge.recipes.check import check

SHIPPED = sorted((Path(__file__).parents[3] / "yaml_recipes").glob("*.yaml"))
SOUND = "merge_method: varm\nbase_model: org/pivot\nmodels:\n  - model: org/a\n  - model: org/b\n"

SLICES = """\
merge_method: varm
base_model: org/pivot
slices:
  - base_model: null
    sources:
      - {model: org/pivot, layer_range: [0, 2]}
      - {model: org/a, layer_range: [1, 3]}
"""


def problems(text: str, kind: str = "yaml") -> list[tuple[int, str]]:
    return [(problem.line, problem.message) for problem in check(text, kind=kind, models=False)]


def the_problem(text: str, kind: str = "yaml") -> tuple[int, str]:
    (found,) = problems(text, kind)
    return found


def test_a_sound_recipe_has_no_problems() -> None:
    assert problems(SOUND) == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_sound(path: Path) -> None:
    text = path.read_text()
    content = yaml.safe_load(text)
    assert problems(text) == []
    config = MergeConfiguration.model_validate(content)
    method = merge_methods.get(config.merge_method)
    known = {parameter.name for parameter in method.spec.parameters}
    entries = [content, *content.get("models", []), *(content.get("slices") or [{}])[0].get("sources", [])]
    assert {name for entry in entries for name in entry.get("parameters") or {}} <= known
    assert f"mergekit-yaml yaml_recipes/{path.name}" in text.split("merge_method")[0]


def test_the_recipe_of_the_readme_is_sound() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (SHIPPED[0].parents[1] / "README.md").read_text(), re.DOTALL)
    (shown,) = [block for block in blocks if "merge_method" in block]
    assert problems(shown) == []


def test_the_published_merges_are_shipped_at_every_granularity() -> None:
    names = {path.stem for path in SHIPPED}
    assert {f"fusechat_7b_v1_varm_{g}" for g in ("model", "layer", "module", "matrix", "parameter")} <= names
    assert {f"fusechat_7b_v1_{m}" for m in ("linear", "slerp", "task_arithmetic", "ties", "dare")} <= names
    assert {f"fusechat_7b_v2_{m}" for m in ("sce", "linear", "task_arithmetic", "ties", "dare")} <= names
    merges = ("qwq", "qwq_skyt1", "qwq_skyt1_flash", "qwen25_instruct", "qwen25_coder")
    assert {f"fuseo1_r1_{m}" for m in merges} <= names


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        ("parameters:\n  granularty: layer", 7, "did you mean `granularity`?"),
        ("paramters:\n  granularity: layer", 6, "unknown top-level key `paramters`; did you mean `parameters`?"),
        ("parameters:\n  granularity: layr", 7, "not 'model', 'layer', 'module', 'matrix' or 'parameter'"),
        ("parameters:\n  granularity: [layer, matrx]", 7, "did you mean `matrix`?"),
        ("parameters:\n  granularity:\n    - filter: mlp\n      value: blok", 9, "`granularity` is `blok`"),
        ("parameters:\n  granularity:\n    - fliter: mlp\n      value: layer", 8, "did you mean `filter`?"),
        ("parameters:\n  granularity:\n    - filter: mlp", 8, "has no `value`"),
        ("parameters:\n  statistic: cube", 7, "`statistic` is `cube`, not 'square' or 'abs'"),
        ("parameters:\n  normalization: max", 7, "not 'sum' or 'softmax'"),
        ("parameters:\n  temperature: 0", 7, "`temperature` is `0`, not greater than 0"),
        ("parameters:\n  temperature: .inf", 7, "not a finite number"),
        ("parameters:\n  temperature: yes", 7, "`temperature` is `True`, not a valid number"),
        ("parameters:\n  select_topk: 0.0", 7, "not greater than 0"),
        ("parameters:\n  select_topk: 1.1", 7, "not less than or equal to 1"),
        ("parameters:\n  erase_minority: 3", 7, "`erase_minority` is `3`, not a valid boolean"),
        ("parameters:\n  density: 0.3", 7, "unknown parameter `density` of varm; known are granularity"),
        ("dtype: bf16", 6, "float32, float64; did you mean `bfloat16`?"),
        ("base_model: org/other", 6, "`base_model` is written twice"),
        ("tokenizer:\n  sorce: union", 7, "unknown key of the tokenizer `sorce`; did you mean `source`?"),
    ],
)
def test_a_mistake_is_named_with_its_line(lines: str, line: int, message: str) -> None:
    found_line, found = the_problem(f"{SOUND}{lines}\n")
    assert found_line == line
    assert message in found


@pytest.mark.parametrize("setting", ["1e-3", '"1e-3"', "[0.5, 1.0]", "[{filter: mlp, value: 2}, {value: 1}]"])
def test_whatever_mergekit_takes_as_a_number_is_taken(setting: str) -> None:
    assert problems(f"{SOUND}parameters: {{temperature: {setting}}}\n") == []


def test_parameters_of_one_model_are_refused() -> None:
    text = SOUND.replace("- model: org/b", "- model: org/b\n    parameters: {granularity: layer}")
    line, message = the_problem(text)
    assert (line, "parameter of the whole merge" in message) == (6, True)


def test_a_recipe_needs_a_pivot_a_target_and_no_model_twice() -> None:
    assert the_problem(SOUND.replace("base_model: org/pivot\n", ""))[1].startswith("no base_model")
    alone = "merge_method: varm\nbase_model: org/pivot\nmodels:\n  - model: org/pivot\n"
    assert the_problem(alone) == (3, "no target: list at least one model beside the base_model org/pivot")
    assert the_problem(SOUND.replace("org/b", "org/a")) == (5, "org/a is listed twice")


def test_what_is_no_model_is_reported_once_and_without_the_names_of_classes() -> None:
    expected = "not a model: a folder or the id of one on the Hub"
    assert problems(SOUND.replace("org/pivot", "5")) == [(2, f"`base_model` is `5`, {expected}")]
    assert problems(SOUND.replace("org/b", "[1]")) == [(5, f"`models.1.model` is `[1]`, {expected}")]
    assert problems("merge_method: varm\nbase_model: org/p\nmodels: 7\n") == [
        (3, "`models` is `7`, not a valid list")
    ]
    for text in ("{}\n", "merge_method: 5\n", f"{SOUND}dtype: 5\n"):
        assert len(check(text, models=False, every=True)) == 1, text


@pytest.mark.parametrize(("written", "meant"), [("fp16", "float16"), ("bf16", "bfloat16"), ("flaot32", "float32")])
def test_a_short_name_of_a_dtype_is_understood(written: str, meant: str) -> None:
    assert the_problem(f"{SOUND}out_dtype: {written}\n")[1].endswith(f"; did you mean `{meant}`?")


def test_a_method_with_two_letters_swapped_is_the_nearest() -> None:
    ((_, message),) = [
        (one.line, one.message) for one in check(SOUND.replace("varm", "vram"), models=False, every=True)
    ]
    assert message == "mergekit knows no method `vram`; did you mean `varm`?"


@pytest.mark.parametrize(
    ("name", "sign"), [("a+b", "`+` as the start of an adapter"), ("a@b", "`@` as the start of a revision")]
)
def test_a_folder_that_mergekit_reads_as_two_names_has_to_be_renamed(
    name: str, sign: str, mistral: Family, tmp_path: Path
) -> None:
    folder = tmp_path / name
    shutil.copytree(mistral.targets[0], folder)
    text = runs.recipe(mistral).replace(str(mistral.targets[0]), str(folder))
    (problem,) = check(text)
    assert problem.message == f"`{folder}` is a folder, and mergekit reads {sign}: rename the folder"


def test_slices_and_modules_are_checked_where_they_nest() -> None:
    text = """\
merge_method: varm
base_model: org/pivot
modules:
  text:
    slices:
      - sources:
          - model: org/a
            layer_rnge: [0, 2]
            layer_range: [0, 2]
        parameters: {granularty: layer}
"""
    assert [line for line, _ in problems(text)] == [6, 8, 10]


def test_a_structure_that_mergekit_refuses_is_refused_in_a_sentence() -> None:
    assert the_problem("merge_method: varm\nbase_model: org/pivot\n")[1].startswith("Exactly one of 'models'")
    assert (5, "no `model` in `models.1`") in problems(SOUND.replace("- model: org/b", "- modl: org/b"))


def test_yaml_that_cannot_be_read_is_a_problem_of_a_varm_recipe_only() -> None:
    line, message = the_problem("merge_method: varm\nmodels: [\n")
    assert message.startswith("not valid YAML")
    assert line >= 2
    assert problems("merge_method: linear\nmodels: [\n") == []


def test_recipes_of_other_methods_are_none_of_our_business() -> None:
    assert problems(SOUND.replace("varm", "ties") + "granularty: layer\n") == []


def test_a_recipe_among_several_may_have_a_name_and_use_the_others() -> None:
    text = f"{SOUND}name: first\n---\n{SOUND.replace('org/a', 'first')}"
    assert check(text, kind="multi", models=False) == []
    assert "unknown top-level key `name`" in the_problem(f"{SOUND}name: first\n")[1]


def test_all_missing_models_are_named_with_what_is_there_instead(
    family: object, mistral: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = mistral.pivot.parent
    monkeypatch.chdir(root)
    near = mistral.targets[0].name + "x"
    text = (
        f"merge_method: varm\nbase_model: ./{mistral.pivot.name}\nmodels:\n  - model: ./{near}\n  - model: org/b\n"
    )
    (root / "empty").mkdir(exist_ok=True)
    found = [(problem.line, problem.message) for problem in check(text.replace("org/b", "./empty"))]
    assert found == [
        (4, f"no model folder `./{near}` (did you mean `{mistral.targets[0].name}`?)"),
        (5, "the folder `./empty` has no config.json"),
    ]
    ((line, message),) = [(p.line, p.message) for p in check(text.replace(near, mistral.targets[0].name))]
    assert line == 5
    assert message == (
        "no model folder `org/b`, and it is not in the Hub cache (HF_HUB_OFFLINE is set: unset it to use the Hub)"
    )


@pytest.mark.slow
def test_the_program_prints_every_problem_and_leaves_no_folder(mistral: Family, tmp_path: Path) -> None:
    """The real mergekit-yaml in a process of its own."""
    text = runs.recipe(mistral, granularty="layer", temperature=-1) + "\nchat_tmplate: auto\n"
    (tmp_path / "recipe.yaml").write_text(text)
    program = Path(sys.executable).parent / "mergekit-yaml"
    done = subprocess.run(
        [program, "recipe.yaml", "out"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Error: recipe.yaml was not merged, it has 3 problems:" in done.stderr
    assert "Traceback" not in done.stderr
    assert [word in done.stderr for word in ("granularty", "temperature", "chat_tmplate")] == [True] * 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "arguments"),
    [(run_yaml, ["out"]), (multimerge, ["-I", "out", "--out-path", "out/last"]), (merge_raw_pytorch, ["out"])],
    ids=["mergekit-yaml", "mergekit-multi", "mergekit-pytorch"],
)
def test_each_of_mergekits_programs_checks_its_file_first(
    script: object, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(SOUND + "parameters: {granularty: layer}\n")
    result = CliRunner().invoke(script.main, ["recipe.yaml", *arguments])  # type: ignore[attr-defined]
    assert result.exit_code == 1
    assert "granularty" in result.output
    assert not (tmp_path / "out" / "last").exists()


def test_a_run_from_python_is_checked_too(mistral: Family, tmp_path: Path) -> None:
    text = runs.recipe(mistral, granularty="layer")
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    with pytest.raises(UserError, match="granularty"):
        run_merge(config, str(tmp_path / "out"), MergeOptions(), config_source=text)
    with pytest.raises(UserError, match="granularty"):
        run_merge(config, str(tmp_path / "out"), MergeOptions())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        SOUND.replace("org/a", "org/a@main+me/adapter"),
        SOUND.replace("- model: org/a", "- model: {model: {path: org/a, revision: main}, lora: null}"),
        SOUND + "tokenizer:\n  source: union\n  tokens:\n    <unk>: {source: org/a, force: true}\n",
        SOUND + "chat_template: auto\ntokenizer_source: base\nout_dtype: float16\n",
        SOUND + "parameters: null\n",
        SOUND + "parameters:\n  granularity: [layer, module, matrix]\n",
        SOUND.replace("base_model: org/pivot", "base_model: &pivot org/pivot") + "  - model: *pivot\n",
        SLICES.replace("{model: org/a,", "{<<: {layer_range: [0, 1]}, <<: {model: org/b}, model: org/a,"),
    ],
)
def test_whatever_mergekit_reads_is_taken(text: str) -> None:
    assert problems(text) == []


def test_a_slice_without_a_pivot_of_its_own_has_the_recipes() -> None:
    assert problems(SLICES) == []
    assert the_problem(SLICES.replace("[1, 3]", "[1, 4]")) == (
        5,
        "the layer_ranges of the sources have different lengths",
    )
    assert "has no layer_range" in the_problem(SLICES.replace("null", "org/b"))[1]
    empty = "merge_method: varm\nbase_model: org/p\nslices:\n  - sources: []\n"
    assert "no target" in problems(empty)[0][1]


@pytest.mark.parametrize(
    "text",
    [
        SOUND + "sources: 5\n",
        SOUND + "sources: abc\n",
        SOUND + "---\n" + SOUND,
        SOUND + "when: 2024-13-45\n",
        SOUND + "loop: &loop\n  - *loop\n",
        SOUND.replace("org/b", "org/\x07"),
        "merge_method: varm\nbase_model: org/p\nmodules: {text: {base_model: 5, models: [{model: org/a}]}}\n",
        "merge_method: varm\nbase_model: org/p\nmodels: 7\n",
        "merge_method: varm\nbase_model: [1]\nmodels: [null]\nslices: {}\nparameters: []\n",
    ],
)
def test_the_check_itself_never_ends_in_a_traceback(text: str) -> None:
    assert problems(text)


def test_mergekit_pytorch_takes_a_path_as_it_stands(tmp_path: Path) -> None:
    folder = tmp_path / "a+b@c+d"
    folder.mkdir()
    lines = ["merge_method: varm", f"base_model: {folder}/pivot.safetensors", "models:"]
    for name in ("pivot", "a"):
        (folder / f"{name}.safetensors").touch()
        lines.append(f"  - model: {folder}/{name}.safetensors")
    assert check("\n".join(lines), kind="raw") == []
    lines.append(f"  - model: {folder}/b.safetensors")
    ((line, message),) = [(problem.line, problem.message) for problem in check("\n".join(lines), kind="raw")]
    assert (line, message.startswith(f"no checkpoint file `{folder}/b.safetensors`")) == (6, True)


def test_mergekit_pytorch_has_no_layers_for_a_gradient(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    models = f"base_model: {tmp_path}/a\nmodels: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/a}}]\n"
    found = check(f"merge_method: varm\n{models}parameters:\n  lambda: [1, 2]\n", kind="raw", models=False)
    assert any((problem.line, "is a gradient" in problem.message) == (5, True) for problem in found)
