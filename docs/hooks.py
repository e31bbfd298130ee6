"""What mkdocs does beyond its plugins: every arXiv id on a page is a link, also in docstrings."""

import re
from typing import Any

_TAG = re.compile(r"(<[^>]+>)")
_ID = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_KEEP = ("a", "pre", "code", "script", "style")  # text inside these is left as it is


def on_page_content(html: str, **_: Any) -> str:
    parts, depth = _TAG.split(html), 0
    for i, part in enumerate(parts):
        if i % 2:
            name = part.strip("</> ").split()[0].lower() if part.strip("</> ") else ""
            if name in _KEEP and not part.endswith("/>"):
                depth += -1 if part.startswith("</") else 1
        elif not depth:
            parts[i] = _ID.sub(r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', part)
    return "".join(parts)
