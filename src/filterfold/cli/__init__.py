"""The command line. Heavy imports happen inside the commands, so that `filterfold --help` is quick."""

from __future__ import annotations

import sys
from importlib.util import find_spec

LAB = (
    "datasets",
    "filelock",
    "jinja2",
    "lightning_fabric",
    "matplotlib",
    "PIL",
    "rich",
    "sklearn",
    "tomli_w",
    "typer",
)
"""What `filterfold[lab]` installs, by the names that are imported."""


REFUSED = 2
"""Exit code for what can't be done as asked, as for a wrong option."""


def main() -> None:
    """Entry point of the `filterfold` command; without the lab's packages it says in one line what to install."""
    if missing := [name for name in LAB if find_spec(name) is None]:
        sys.stderr.write(
            f"filterfold: the command line needs {', '.join(missing)}; install with: pip install 'filterfold[lab]'\n"
        )
        sys.exit(REFUSED)
    from .app import run

    run()
