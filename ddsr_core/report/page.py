"""Self-contained HTML pages: one file each, with its style, its script and its pictures inside. Nothing is loaded.

A content security policy allows only the page's own script, by its hash, so that a file name of a photo cannot run code.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from jinja2 import BaseLoader, ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ddsr_core.report.table import number

TEMPLATES = PackageLoader("ddsr_core.report", "templates")


def page(template: str, templates: BaseLoader = TEMPLATES, **values: Any) -> str:
    """Render a template that extends ``base.html.j2``."""
    environment = Environment(
        loader=ChoiceLoader([templates, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "percent": percent, "duration": duration, "size": size}
    # Ours, and no data in it: not escaped.
    script = Markup(TEMPLATES.get_source(environment, "page.js")[0])  # nosec B704
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(script=script, script_hash=digest, **values)


def signed(value: float | None, digits: int = 2) -> str:
    """``value`` with its sign, with a true minus sign."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share in percent, with three significant digits.

    >>> percent(0.00684), percent(0.5)
    ('0.684%', '50%')
    """
    return "–" if value is None else f"{100 * value:.3g}%"


def duration(seconds: float) -> str:
    """
    >>> duration(3.21), duration(75), duration(7_325)
    ('3.2 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """
    >>> size(901_341), size(12_300_000), size(4_200_000_000)
    ('0.9 MB', '12 MB', '4.2 GB')
    """
    number, unit = (count / 1e9, "GB") if count >= 1e9 else (count / 1e6, "MB")
    return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"
