"""``varm-merge doctor``: does stock mergekit see the method here?"""

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


@click.command()
def doctor() -> None:
    """Does stock mergekit-yaml see `varm` in this environment?

    Exit code 0 if it does, 1 if not; what to do is printed.

    \b
    Example:
      varm-merge doctor
    """
    from varm_common.versions import versions

    for package, number in {"python": sys.version.split()[0], **versions()}.items():
        click.echo(f"{package:14} {number}")
    problems = _diagnose()
    for problem in problems:
        click.secho(f"✗ {problem}", fg="red")
    if problems:
        click.echo("Until then `varm-merge yaml recipe.yaml out/` does what `mergekit-yaml` would.")
        sys.exit(1)
    click.secho("✓ stock mergekit-yaml sees `merge_method: varm`", fg="green")


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
