"""What all pages share: the document with its style sheet and security policy, tables, links."""

from __future__ import annotations

from html import escape
from pathlib import Path
from urllib.parse import quote

from runtime.folders import write_atomically

WEB = Path(__file__).parent / "web"
# What the browser may load. alone: nothing. folder: pictures and videos beside the page.
POLICIES = {
    "alone": (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    ),
    "folder": (
        "default-src 'none'; img-src data: 'self' file:; media-src 'self' file:; "
        "style-src 'unsafe-inline'"
    ),
}


def document(title: str, body: str, policy: str = "alone") -> str:
    """A complete page. policy: one of POLICIES."""
    # The page may load nothing but what the policy allows, even if a result contains markup.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICIES[policy]}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{(WEB / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def grid(head: list[str], body: list[str], label: str) -> str:
    """A table that scrolls horizontally.

    Cells of `head` and rows of `body` are HTML. label: the name that screen readers announce.
    """
    # tabindex lets keyboard users scroll the table.
    cells = "".join(f"<th scope='col'>{cell}</th>" for cell in head)
    rows = "\n".join(body)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"
    )


def row(first: str, cells: list[str], kind: str = "") -> str:
    """A table row of HTML cells; the first cell is its header. A cell may be a complete <td>."""
    parts = [cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells]
    opening = f'<tr class="{kind}">' if kind else "<tr>"
    return f"{opening}<th scope='row'>{first}</th>{''.join(parts)}</tr>"


def link(target: str, text: str) -> str:
    """A link to a file beside the page."""
    return f'<a href="{escape(quote(target))}">{escape(text)}</a>'


def write_page(file: Path, text: str) -> Path:
    """Write a page atomically; returns its path."""
    with write_atomically(file) as page:
        page.write(text.encode())
    return file
