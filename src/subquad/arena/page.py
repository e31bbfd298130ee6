"""The pages' common frame: one HTML file that needs nothing from elsewhere."""

from collections.abc import Mapping
from typing import Any


def render(template: str, drawings: Mapping[str, str], **values: Any) -> str:
    """A page from its template; drawings are inline SVG, by name in `plots`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("subquad.arena", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    plots = {name: Markup(svg) for name, svg in drawings.items()}
    return environment.get_template(template).render(plots=plots, **values)
