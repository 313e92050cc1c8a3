"""``varm-merge doctor``: does stock mergekit know the method here?"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import click

__all__ = ["PROBE", "doctor"]

PROBE = """
import json, sys
import mergekit.merge_methods as methods
hook = sys.modules.get("_varm_merge_autoload")
report = {"hook": getattr(hook, "__file__", None)}
try:
    method = methods.get("varm")
    import mergekit.plan, mergekit.merge
    report["method"] = type(method).__module__
    report["refusal"] = method.refusal
    report["attached"] = all(getattr(m, "_varm_merge_attached", False) for m in (mergekit.plan, mergekit.merge))
except RuntimeError as error:
    report["error"] = str(error)
print(json.dumps(report))
"""


@click.command()
def doctor() -> None:
    """Check whether mergekit-yaml knows `varm` in this environment.

    Exit code 0 if it does. Otherwise the cause and the next step are printed, and the exit code is 1.

    \b
    Example:
      varm-merge doctor
    """
    from varm_common.versions import versions

    for package, number in {"python": sys.version.split()[0], **versions()}.items():
        click.echo(f"{package:14} {number}")
    problems = _problems()
    for problem in problems:
        click.secho(f"✗ {problem}", fg="red")
    if problems:
        click.echo("Until then `varm-merge yaml recipe.yaml out/` does what `mergekit-yaml` would.")
        sys.exit(1)
    click.secho("✓ stock mergekit-yaml sees `merge_method: varm`", fg="green")


def _problems() -> list[str]:
    """Why a new Python of this environment does not know the method; prints the start-up hook and the program."""
    probe = subprocess.run(  # away from the current folder, as mergekit-yaml itself starts
        [sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=Path(sys.executable).parent
    )
    if probe.returncode:
        reason = probe.stderr.strip().splitlines()[-1] if probe.stderr.strip() else "no message"
        return [f"mergekit cannot be imported: {reason}"]
    report = json.loads(probe.stdout.splitlines()[-1])
    click.echo(f"{'start-up hook':14} {report['hook'] or 'not active'}")
    problems = []
    if "error" in report:
        problems.append(_why_unknown(report["hook"]))
    elif report["refusal"]:
        problems.append(report["refusal"])
    elif not report["attached"]:
        problems.append(f"`varm` is registered but not attached to mergekit's planning: {probe.stderr.strip()}")
    script = shutil.which("mergekit-yaml")
    own = Path(sys.executable).parent / "mergekit-yaml"
    user = Path(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))) / "mergekit-yaml"
    click.echo(f"{'mergekit-yaml':14} {script or 'not on PATH'}")
    if script is None:
        problems.append(f"`mergekit-yaml` is not on PATH; it should be {own}. Activate this environment.")
    elif Path(script).resolve() not in {own.resolve(), user.resolve()}:
        other = f"`mergekit-yaml` on PATH is that of another environment ({script}); this one's is {own}."
        problems.append(f"{other} Activate this environment, or install varm-merge into the other.")
    return problems


def _why_unknown(hook: str | None) -> str:
    if os.environ.get("VARM_MERGE_AUTOLOAD") == "0":
        return "the start-up hook is switched off by VARM_MERGE_AUTOLOAD=0. Unset it."
    if hook is None:
        return (
            "no start-up file was read. Reinstall varm-merge into this environment "
            "(`pip install --force-reinstall --no-deps varm-merge`). A Python started with -S, or from a zipped "
            "application, reads none."
        )
    return f"the start-up hook {hook} ran, but `varm` was not registered. Reinstall varm-merge."
