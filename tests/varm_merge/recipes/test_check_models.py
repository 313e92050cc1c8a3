"""``varm-merge check``: all that is wrong with a recipe of any method, before a weight is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mergekit.merge
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registered_methods
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from tiny_models import Family
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import varm_merge.merging.method  # noqa: F401  registers varm
from varm_merge.cli import main
from varm_merge.merging.lineage import Place
from varm_merge.recipes import headers
from varm_merge.recipes.check import check
from varm_merge.recipes.headers import read_model
from varm_merge.recipes.problems import Looked

OF_TWO = {"slerp", "nearswap", "arcee_fusion"}
VALUES = {"weight": 0.5, "t": 0.3}
"""Of the parameters that have no default."""


def recipe_of(method: str, family: Family) -> dict[str, Any]:
    """A recipe that is sound."""
    spec = next(one.spec for one in registered_methods() if one.spec.name == method)
    inputs = (
        family.targets[:1] if method in OF_TWO else [family.pivot] if method == "passthrough" else family.targets
    )
    content: dict[str, Any] = {"merge_method": method, "models": [{"model": str(one)} for one in inputs]}
    if spec.contract.base.value != "ignored":
        content["base_model"] = str(family.pivot)
    required = {one.name: VALUES[one.name] for one in spec.parameters if one.required}
    return {**content, "parameters": required, "dtype": "float32"}


def messages_of(content: dict[str, Any], looked: Looked | None = None) -> list[str]:
    problems = check(yaml.safe_dump(content, sort_keys=False), every=True, looked=looked)
    return [f"{problem.line}: {problem.message}" for problem in problems]


METHODS = sorted(one.spec.name for one in registered_methods())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_sound_recipe_of_any_method_is_sound_and_merges(method: str, mistral: Family, tmp_path: Path) -> None:
    looked, content = Looked(), recipe_of(method, mistral)
    assert messages_of(content, looked) == []
    assert looked.remarks == []
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    mergekit.merge.run_merge(MergeConfiguration.model_validate(content), str(tmp_path), options=options)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert looked.estimate["written_bytes"] == pytest.approx(written, rel=0.1)


def mergekit_fails(content: dict[str, Any], out: Path) -> bool:
    try:
        config = MergeConfiguration.model_validate(content)
        mergekit.merge.run_merge(config, str(out), options=MergeOptions(quiet=True, copy_tokenizer=False))
    except Exception:  # of whatever kind
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name != "varm"])
def test_too_few_or_too_many_models_and_missing_parameters_are_what_mergekit_refuses(
    method: str, mistral: Family, tmp_path: Path
) -> None:
    """The same verdict as mergekit's own run, for every change of a sound recipe."""
    sound = recipe_of(method, mistral)
    every = [{"model": str(one)} for one in (mistral.pivot, *mistral.targets)]
    changes: list[dict[str, Any]] = [
        {"models": every},
        {"models": every[1:2]},
        {"base_model": None},
        *({"parameters": {}} for _ in [1] if sound["parameters"]),
    ]
    for number, change in enumerate(changes):
        content = {name: value for name, value in {**sound, **change}.items() if value is not None}
        found = messages_of(content)
        assert bool(found) == mergekit_fails(content, tmp_path / str(number)), (change, found)


def sources(content: dict[str, Any], *spans: list[int]) -> dict[str, Any]:
    """The same recipe, of slices of its models."""
    entries = [{"model": content["base_model"]}] if content.get("base_model") else []
    entries += [one for one in content["models"] if one not in entries]
    parts = [one | {"layer_range": span} for one, span in zip(entries, spans * len(entries), strict=False)]
    return {name: value for name, value in content.items() if name != "models"} | {"slices": [{"sources": parts}]}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "karcher", "passthrough", "ties", "slerp", "nuslerp", "varm"])
def test_models_layers_and_filters_are_judged_as_mergekit_judges_them(
    method: str, mistral: Family, tmp_path: Path
) -> None:
    """For each method and changes of a sound recipe its verdict is mergekit's own."""
    sound = recipe_of(method, mistral)
    names = list(sound["parameters"])
    filtered = [{"filter": "mlp", "value": 0.5}]
    every = [{"filter": part, "value": 0.5} for part in ("attn", "mlp", "norm", "embed", "lm_head")]
    weighed = [one | {"parameters": {"weight": 0.5}} for one in sound["models"]]
    changes: list[dict[str, Any]] = [
        sound,
        sound | {"base_model": str(mistral.pivot)},
        sound | {"models": [*sound["models"], sound["models"][0]]},
        sources(sound, [0, 2]),
        sources(sound, [0, 3]),
        sources(sound, [1, 4]),
        sources(sound, [-1, 1]),
        sources(sound, [0, 1], [0, 2]),
        *(sound | {"parameters": dict.fromkeys(names, value)} for value in (filtered, every) if names),
        *(sound | {"parameters": {"weight": value}} for value in (True, False) if "weight" in names),
        *(
            {**sound, "models": weighed, "parameters": {}, "base_model": base}
            for base in ([str(mistral.pivot)] if "weight" in names else [])
        ),
    ]
    for number, content in enumerate(changes):
        found = messages_of(content, Looked())
        assert bool(found) == mergekit_fails(content, tmp_path / str(number)), (content, found)


def save_tokenizer(folder: Path, vocabulary: dict[str, int]) -> None:
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def test_tokens_come_from_models_that_are_there_and_are_compared(mistral: Family, tmp_path: Path) -> None:
    family = []
    for number, path in enumerate((mistral.pivot, *mistral.targets)):
        family.append(changed(path, tmp_path / f"m{number}", lambda t: None))
        tokens = ["<unk>", *("bac" if number == 2 else "abc"), f"<{number // 2}>"]
        save_tokenizer(family[-1], {token: id_ for id_, token in enumerate(tokens)})
    pivot, *targets = family
    sound = recipe_of("varm", Family(pivot, tuple(targets)))
    looked = Looked()
    assert messages_of(sound, looked) == []
    (remark,) = looked.remarks
    assert (remark.line, remark.message.startswith(f"3 ids stand for other tokens in {targets[1]} than")) == (
        4,
        True,
    )
    outside = str(mistral.pivot)
    larger = changed(targets[0], tmp_path / "larger", lambda t: None)
    save_tokenizer(larger, {"<unk>": 41, **{str(id_): id_ for id_ in range(41)}})
    models = [{"model": str(larger)}, {"model": str(targets[1])}]
    for change, wrong in (
        ({"tokenizer_source": "./nowhere"}, "no tokenizer folder `./nowhere`"),
        ({"tokenizer": {"source": "./nowhere"}}, "no tokenizer folder `./nowhere`"),
        ({"tokenizer": {"source": outside}}, f"the folder `{outside}` has no tokenizer"),
        ({"tokenizer": {"tokens": {"a": {"source": outside}}}}, f"`{outside}` is not among the models"),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "model_token", "model": outside, "token": "b"}}}}},
            f"`{outside}` is not among the models",
        ),
        ({"tokenizer": {"source": str(pivot), "tokens": {"a": {"source": str(targets[0])}}}}, ""),
        ({"tokenizer_source": "base"}, ""),
        ({"tokenizer_source": str(larger), "models": models}, f"the tokenizer of `{larger}` has the token"),
    ):
        looked = Looked()
        problems = messages_of(sound | change, looked)
        assert [wrong in one for one in problems] == [True] * bool(wrong), problems
        assert looked.remarks == []
        if wrong:
            assert mergekit_fails(sound | change, tmp_path / "out")


WRONG = """\
merge_method: ties
base_modle: {pivot}
base_model: {pivot}
models:
  - model: {target}
    parameters: {{weight: 0.5, densty: 0.3, normalize: true}}
  - model: {other}
  - model: ./nowhere
parameters: {{normalise: true, lambda: x, int8_mask: 3}}
dtype: blah
"""


def test_everything_that_is_wrong_is_reported_at_once(mistral: Family) -> None:
    text = WRONG.format(pivot=mistral.pivot, target=mistral.targets[0], other=mistral.targets[1])
    found = {f"{problem.line}: {problem.message}" for problem in check(text, every=True)}
    for expected in (
        "2: unknown top-level key `base_modle`; did you mean `base_model`?",
        "6: unknown parameter `densty` of ties; did you mean `density`?",
        "6: `normalize` is a parameter of the whole merge",
        f"7: {mistral.targets[1]} has no `weight`, which ties needs",
        "8: ./nowhere has no `weight`, which ties needs",
        "8: no model folder `./nowhere`",
        "9: unknown parameter `normalise` of ties; did you mean `normalize`?",
        "9: `lambda` is `x`, not a valid number",
        "9: `int8_mask` is `3`, not a valid boolean",
        "10: `dtype` is `blah`, not one of float16, bfloat16, float32, float64",
    ):
        (one,) = [problem for problem in found if problem.startswith(expected)]
        found.remove(one)
    assert not found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("merge_method: tiess\nmodels: []\n", "1: mergekit knows no method `tiess`; did you mean `ties`?"),
        ("models: []\n", "1: no `merge_method`"),
        ("", "1: no recipe: a recipe is a mapping with `merge_method`"),
        ("# nothing\n", "1: no recipe: a recipe is a mapping with `merge_method`"),
        ("- a\n", "1: no recipe: a recipe is a mapping with `merge_method`"),
        ("merge_method: [\n", "not valid YAML"),
    ],
)
def test_what_is_no_recipe_is_reported(text: str, problem: str) -> None:
    assert any(problem in f"{one.line}: {one.message}" for one in check(text, every=True))


def test_the_shipped_recipes_are_sound() -> None:
    recipes = sorted((Path(__file__).parents[3] / "yaml_recipes").glob("*.yaml"))
    assert len(recipes) > 5
    assert {path.name: check(path.read_text(), every=True, models=False) for path in recipes} == {
        path.name: [] for path in recipes
    }


def test_slices_and_filters_of_any_method_are_read(mistral: Family) -> None:
    pivot, (target, _) = mistral.pivot, mistral.targets
    sources = [{"model": str(one), "layer_range": [0, 2]} for one in (pivot, target)]
    parameters = {"t": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": 0.5}]}
    content = {
        "merge_method": "slerp",
        "base_model": str(pivot),
        "slices": [{"sources": sources}],
        "dtype": "float32",
    }
    assert messages_of({**content, "parameters": parameters}, Looked()) == []
    assert messages_of({**content, "slices": [{"sources": sources, "parameters": parameters}]}, Looked()) == []
    (problem,) = messages_of(content)
    assert problem.endswith("slerp needs the parameter `t`")
    (problem,) = messages_of(
        {**content, "parameters": {"t": [{"filter": "mlp", "value": ["x", 1]}, {"value": 0.5}]}}
    )
    assert problem.endswith("`t` is `x`, not a valid number")


# Headers


def changed(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


DOWN = "model.layers.1.mlp.down_proj.weight"


def test_models_that_do_not_fit_are_distinguished_by_their_headers(mistral: Family, tmp_path: Path) -> None:
    target, other = mistral.targets
    narrow = changed(target, tmp_path / "narrow", lambda t: t.update({DOWN: t[DOWN][:, 1:].contiguous()}))
    short = changed(target, tmp_path / "short", lambda t: t.pop(DOWN), num_hidden_layers=1)
    torn = changed(target, tmp_path / "torn", lambda t: t.pop(DOWN))
    foreign = changed(target, tmp_path / "foreign", lambda t: None, architectures=["LlamaForCausalLM"])
    embeddings = "model.embed_tokens.weight"
    cut = changed(target, tmp_path / "cut", lambda t: t.update({embeddings: t[embeddings][1:].contiguous()}))
    half = changed(target, tmp_path / "half", lambda t: t.update({name: w.bfloat16() for name, w in t.items()}))
    for folder, wrong, remarked in (
        (narrow, f"`{DOWN}` has the shape", ""),
        (short, f"{short} has 1 layers, {mistral.pivot} ", ""),
        (torn, f"`{torn}` has no `{DOWN}`, which mergekit requires for MistralForCausalLM", ""),
        (foreign, f"{foreign} is a LlamaForCausalLM, {mistral.pivot} a MistralForCausalLM", ""),
        (cut, "`tokenizer: {source: base}` brings their tokens into one order", ""),
        (half, "", "have the dtypes BF16 and F32"),
    ):
        content = recipe_of("varm", mistral)
        assert content.pop("dtype")
        content["models"] = [{"model": str(other)}, {"model": str(folder)}]
        looked = Looked()
        problems = messages_of(content, looked)
        assert bool(problems) == bool(wrong), problems
        assert any(one.startswith("4: ") and wrong in one for one in problems) or not wrong, problems
        assert any(remarked in one.message for one in looked.remarks) or not remarked, looked.remarks
    looked = Looked()
    messages_of({**content, "dtype": "float32"}, looked)
    assert not any("dtype" in one.message for one in looked.remarks)


@pytest.mark.parametrize("architecture", ["gpt_neox", "mixtral", "mpt", "t5", "qwen2", "gemma"])
def test_a_header_is_what_the_files_hold(architecture: str, family: Callable[..., Family]) -> None:
    members = family(architecture, dtype=torch.bfloat16)
    found = read_model(Place(str(members.pivot)))
    tensors = load_file(members.pivot / "model.safetensors")
    assert {name: shape for name, (shape, _) in found.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert found.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert found.layers
    sizes = headers.estimate([found, found], {name: (shape, 4) for name, (shape, _) in found.tensors.items()})
    elements = sum(tensor.numel() for tensor in tensors.values())
    assert (sizes["parameters"], sizes["read_bytes"]) == (elements, 2 * found.bytes)
    assert sizes["largest_tensor_bytes"] == 3 * 4 * max(tensor.numel() for tensor in tensors.values())
    assert sizes["written_bytes"] == 4 * elements


def test_slices_of_a_model_with_more_layers_and_buffers_nobody_reads_are_no_problem(
    mistral: Family, tmp_path: Path
) -> None:
    target, _ = mistral.targets
    deeper = changed(
        target,
        tmp_path / "deeper",
        lambda t: t.update(
            {n.replace("layers.1", "layers.2"): w.clone() for n, w in t.items() if "layers.1" in n}
        ),
        num_hidden_layers=3,
    )
    sources = [{"model": str(one), "layer_range": [0, 2]} for one in (mistral.pivot, deeper)]
    content = {"merge_method": "varm", "base_model": str(mistral.pivot), "slices": [{"sources": sources}]}
    assert messages_of(content, Looked()) == []
    options = MergeOptions(quiet=True, copy_tokenizer=False)
    mergekit.merge.run_merge(MergeConfiguration.model_validate(content), str(tmp_path / "out"), options=options)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    old = changed(mistral.pivot, tmp_path / "old", lambda t: t.update({name: torch.ones(4)}))
    content = recipe_of("varm", mistral) | {"base_model": str(old)}
    assert messages_of(content, Looked()) == []
    assert not mergekit_fails(content, tmp_path / "of-old")


def test_a_damaged_file_and_a_missing_shard_are_named(mistral: Family, tmp_path: Path) -> None:
    for name, damage in (
        ("cut", lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 100)),
        (
            "gone",
            lambda folder: shutil.move(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors"),
        ),
    ):
        folder = tmp_path / name
        shutil.copytree(mistral.targets[0], folder)
        damage(folder)
        if name == "gone":
            index = {
                "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        content = recipe_of("linear", mistral)
        content["models"] = [{"model": str(mistral.targets[1])}, {"model": str(folder)}]
        (problem,) = messages_of(content, Looked())
        assert f"the weights of `{folder}` cannot be read: " in problem
        assert name == "cut" or "names `model-00002-of-00002.safetensors`, and that file is not there" in problem


def test_a_model_in_the_hubs_cache_is_read_there_and_one_that_is_not_is_reported(
    mistral: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--org--target"
    shutil.copytree(mistral.targets[0], cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    content = recipe_of("varm", mistral)
    content["models"] = [{"model": "org/target"}, {"model": str(mistral.targets[1])}]
    looked = Looked()
    assert check(yaml.safe_dump(content), every=True, looked=looked) == []
    assert looked.estimate["read_bytes"] == 3 * read_model(Place(str(mistral.pivot))).bytes
    shutil.rmtree(cached / "snapshots" / "abc")
    with pytest.raises(
        ValueError, match=r"the header of `org/target` cannot be read: .*: HF_HUB_OFFLINE is set; unset it"
    ):
        read_model(Place("org/target", None, str(tmp_path)))


# The command


def test_the_command_prints_problems_remarks_and_sizes(mistral: Family, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of("varm", mistral)))
    done = CliRunner().invoke(main, ["check", str(path)])
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"✓ {path} can be merged\n")
    assert "\nreads " in done.stdout
    content = recipe_of("ties", mistral)
    content["models"].append({"model": "./nowhere"})
    path.write_text(yaml.safe_dump(content))
    done = CliRunner().invoke(main, ["check", str(path)])
    assert (done.exit_code, done.stderr) == (1, "")
    assert done.stdout.startswith("✗ line 7: no model folder `./nowhere`")
    as_json = CliRunner().invoke(main, ["check", str(path), "--json"])
    assert as_json.exit_code == 1
    found = json.loads(as_json.stdout)
    assert [one["line"] for one in found["problems"]] == [7]
    assert (found["recipe"], found["estimate"]) == (str(path), {})
    alone = CliRunner().invoke(main, ["check", str(path), "--offline"])
    assert (alone.exit_code, alone.output) == (0, f"✓ {path} has no problems; its models were not checked\n")
