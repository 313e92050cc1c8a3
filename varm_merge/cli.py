"""The ``varm-merge`` program."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import click

from varm_merge.tables import show
from varm_merge.version import __version__
from varm_merge.weights import Granularity

__all__ = ["main"]

PROBE = """
import json, sys
import mergekit.merge_methods as methods
hook = sys.modules.get("_varm_merge_autoload")
found = {"hook": getattr(hook, "__file__", None)}
try:
    method = methods.get("varm")
    import mergekit.plan, mergekit.merge
    found["method"] = type(method).__module__
    found["refusal"] = method.refusal
    found["attached"] = all(getattr(m, "_varm_merge_attached", False) for m in (mergekit.plan, mergekit.merge))
except RuntimeError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="varm-merge")
def main() -> None:
    """Merge LLMs by Variation Ratio Merge (VaRM), inside stock mergekit.

    The merge itself needs no program of ours: write `merge_method: varm` in a recipe and run
    `mergekit-yaml recipe.yaml out/`.
    """


@main.command()
def doctor() -> None:
    """Does stock mergekit-yaml see `varm` in this environment?

    Exit code 0 if it does, 1 if not; what to do is printed.

    \b
    Example:
      varm-merge doctor
    """
    from varm_merge.report import versions

    for package, number in {"python": sys.version.split()[0], **versions()}.items():
        click.echo(f"{package:14} {number}")
    problems = _diagnose()
    for problem in problems:
        click.secho(f"✗ {problem}", fg="red")
    if problems:
        click.echo("Until then `varm-merge yaml recipe.yaml out/` does what `mergekit-yaml` would.")
        sys.exit(1)
    click.secho("✓ stock mergekit-yaml sees `merge_method: varm`", fg="green")


@main.command(
    "yaml",
    context_settings={
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": [],
    },
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def yaml_command(arguments: tuple[str, ...]) -> None:
    """Run mergekit-yaml with `varm` registered by import.

    For environments where start-up files are forbidden. Takes what mergekit-yaml takes.

    \b
    Example:
      varm-merge yaml recipe.yaml out/ --cuda
    """
    from mergekit.scripts.run_yaml import main as mergekit_yaml  # importing varm_merge has set the hook

    mergekit_yaml.main(list(arguments), prog_name="varm-merge yaml")


@main.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--cache-dir", type=click.Path(file_okay=False), help="Of models from the Hub.")
@click.option("--offline", is_flag=True, help="Look at the recipe alone, not at its models.")
def check(recipe: Path, as_json: bool, cache_dir: str | None, offline: bool) -> None:
    """Find all that is wrong with a recipe of any merge method, before weights are read or downloaded.

    Of the models only configs and safetensors headers are read; of a model on the Hub by HTTP ranges.
    Exit code 0 if it can be merged, 1 if not.

    \b
    Examples:
      varm-merge check recipe.yaml
      varm-merge check recipe.yaml --json
    """
    from varm_merge.recipe import Looked
    from varm_merge.recipe import check as problems_of

    looked = None if offline else Looked()
    text = recipe.read_text(encoding="utf-8", errors="replace")
    problems = problems_of(text, models=not offline, cache_dir=cache_dir, every=True, looked=looked)
    remarks = sorted(looked.remarks, key=lambda one: one.line) if looked else []
    estimate = looked.estimate if looked else {}
    if as_json:
        told = {
            name: [asdict(one) for one in some] for name, some in (("problems", problems), ("remarks", remarks))
        }
        click.echo(json.dumps({"recipe": str(recipe), **told, "estimate": estimate}, indent=1))
    else:
        for mark, colour, some in (("✗", "red", problems), ("!", "yellow", remarks)):
            for one in some:
                click.secho(f"{mark} line {one.line}: {one.message}", fg=colour)
        if not problems:
            verdict = "is sound; its models were not looked at" if offline else "can be merged"
            click.secho(f"✓ {recipe} {verdict}", fg="green")
        if estimate:
            sizes = {name: f"{value / 1e9:.3g} GB" for name, value in estimate.items() if name.endswith("bytes")}
            click.echo(f"if as large as its base: {estimate['parameters']:,} parameters")
            click.echo(f"reads {sizes['read_bytes']}, writes {sizes['written_bytes']}")
            click.echo(f"the largest tensor of all models takes {sizes['largest_tensor_bytes']}")
    sys.exit(1 if problems else 0)


@main.command()
@click.argument("recipe", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--granularity",
    "granularities",
    multiple=True,
    type=click.Choice(get_args(Granularity)),
    help="One to show beside the recipe's own; may be given several times. Default: all five.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--png",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the weights of the last granularity named.",
)
@click.option(
    "--top", type=click.IntRange(min=0), default=5, show_default=True, help="Most and least moved tensors."
)
@click.option("--device", default="cpu", show_default=True, help="Where tensors are measured.")
@click.option("--cache-dir", type=click.Path(file_okay=False), help="Of models from the Hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the model repositories bring along.")
@click.option("--quiet", is_flag=True, help="No progress.")
def inspect(
    recipe: Path,
    granularities: tuple[str, ...],
    as_json: bool,
    png: Path | None,
    top: int,
    device: str,
    cache_dir: str | None,
    trust_remote_code: bool,
    quiet: bool,
) -> None:
    """Show the weights that a `varm` recipe would give, without the merge.

    RECIPE is a recipe, or a model that was merged by varm (its folder or varm_weights.json). Exit code 1 if the
    recipe cannot be merged.

    \b
    Examples:
      varm-merge inspect recipe.yaml
      varm-merge inspect recipe.yaml --granularity layer --json > weights.json
      varm-merge inspect recipe.yaml --granularity module --png weights.png
      varm-merge inspect merged/
    """
    from mergekit.options import MergeOptions

    from varm_merge import inspection, picture
    from varm_merge.errors import VarmError

    options = MergeOptions(
        device=device, transformers_cache=cache_dir, trust_remote_code=trust_remote_code, quiet=quiet
    )
    try:
        found = inspection.inspect(recipe, options, granularities)
        if png is not None:
            picture.draw(found, granularities[-1] if granularities else inspection.RECIPE, png)
    except VarmError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for table in inspection.tables(found, top):
        show(*table)


def _diagnose() -> list[str]:
    """What keeps a fresh Python of this environment from seeing the method, in sentences; prints what works."""
    # A fresh interpreter, away from the current folder: what mergekit-yaml itself would start as.
    probe = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        cwd=Path(sys.executable).parent,
        check=False,
    )
    if probe.returncode:
        reason = probe.stderr.strip().splitlines()[-1] if probe.stderr.strip() else "no message"
        return [f"mergekit cannot be imported: {reason}"]
    found = json.loads(probe.stdout.splitlines()[-1])
    click.echo(f"{'start-up hook':14} {found['hook'] or 'not active'}")
    problems = []
    if "error" in found:
        problems.append(_why_not_seen(found["hook"]))
    elif found["refusal"]:
        problems.append(found["refusal"])
    elif not found["attached"]:
        problems.append(f"`varm` is registered but not attached to mergekit's planning: {probe.stderr.strip()}")
    script = shutil.which("mergekit-yaml")
    beside = Path(sys.executable).parent / "mergekit-yaml"
    user_scripts = Path(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user")))
    click.echo(f"{'mergekit-yaml':14} {script or 'not on PATH'}")
    if script is None:
        problems.append(f"`mergekit-yaml` is not on PATH; it should be {beside}. Activate this environment.")
    elif Path(script).resolve() not in {beside.resolve(), (user_scripts / "mergekit-yaml").resolve()}:
        problems.append(
            f"`mergekit-yaml` on PATH is that of another environment ({script}); this one's is {beside}. "
            "Activate this environment, or install varm-merge into the other."
        )
    return problems


def _why_not_seen(hook: str | None) -> str:
    if os.environ.get("VARM_MERGE_AUTOLOAD") == "0":
        return "the start-up hook is switched off by VARM_MERGE_AUTOLOAD=0. Unset it."
    if hook is None:
        return (
            "no start-up file was read. Reinstall varm-merge into this environment "
            "(`pip install --force-reinstall --no-deps varm-merge`); a Python started with -S or -I -S, or a "
            "zipped application, reads none."
        )
    return f"the start-up hook {hook} ran, but `varm` was not registered. Reinstall varm-merge."
