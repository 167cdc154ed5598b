"""Pages: one HTML file with everything in it: no network, no script, light and dark, screen and paper."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from .figure import css


def render(template: str, **values: Any) -> str:
    """A page.

    Jinja2 escapes everything that comes from records; the plots' markup is passed through, since Matplotlib escapes it.

    **Arguments:**

    - `template`: file name beside this module.
    - `values`: what the template and the layout ask for: `title`, `kind` and `facts`, and more.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    from ... import __version__

    here = files(__package__)

    def text(name: str) -> str:
        return here.joinpath(name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(text), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    page = environment.get_template(template).render(
        css=css, style_sheet=text("page.css"), version=__version__, **values
    )
    return f"{page.strip()}\n"
