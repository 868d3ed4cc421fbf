"""The frame of a page that needs nothing else: the browser loads nothing for it from anywhere."""

from __future__ import annotations

from html import escape


def document(title: str, style: str, main: str, script: str = "") -> str:
    """A whole HTML document of the HTML ``main``; without ``script`` the browser may run none."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    policy += "; script-src 'unsafe-inline'" if script else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
{main}
</main>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""
