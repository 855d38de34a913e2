"""What every command has as a program: its version and its shell completion. A shell runs the
command for its proposals, so nothing heavy is imported here."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import Distribution, PackageNotFoundError
from typing import Literal

from ..checkpoint.choice import SHORT_NAMES
from ..errors import SourceError

Shell = Literal["bash", "zsh", "fish"]
# At the first Tab zsh runs the file as the completion itself; Typer's only defines it.
_FIRST_TAB = '\n[[ $zsh_eval_context[-1] == loadautofunc ]] && "$_comps[{}]" "$@"'


def variable(program: str) -> str:
    """Return the environment variable through which a shell asks a program for proposals.

    It has no dot, unlike the program's name: some shells drop variables with a dot.
    """
    return f"_{re.sub('[^A-Z0-9]', '_', program.upper())}_COMPLETE"


def among(*values: str) -> Callable[[str], list[str]]:
    """Return a completion that proposes fixed values."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def model_names(incomplete: str) -> list[tuple[str, str]]:
    """Propose the short names of models, with their repositories. Where none fits, the shell
    proposes files."""
    return [(name, repo) for name, repo in SHORT_NAMES.items() if name.startswith(incomplete)]


def scripts(shell: Shell) -> str:
    """Return what a shell has to read to complete every command of the package."""
    return "\n\n".join(_script(shell, name) for name in _programs())


def install(shell: Shell) -> list[str]:
    """Write these scripts where the shell reads them in each new session. Return the files."""
    from typer.completion import install as install_one

    files = []
    for name in _programs():
        _, file = install_one(shell, prog_name=name, complete_var=variable(name))
        file.write_text(_script(shell, name) + "\n")
        files.append(str(file))
    return files


def _script(shell: Shell, name: str) -> str:
    from typer.completion import get_completion_script

    script = get_completion_script(prog_name=name, complete_var=variable(name), shell=shell)
    return script + (_FIRST_TAB.format(name) if shell == "zsh" else "")


def version() -> str:
    """Return the version of the installed package."""
    return _installed().version


def _programs() -> list[str]:
    """Return the names of the commands that the package installs."""
    return sorted(_installed().entry_points.select(group="console_scripts").names)


def _installed() -> Distribution:
    try:
        return Distribution.from_name("mlx-diffgemma")
    except PackageNotFoundError as error:
        raise SourceError(
            "mlx_diffgemma runs from a folder and is not installed, so it has neither version nor "
            "programs; run in that folder: pip install -e ."
        ) from error
