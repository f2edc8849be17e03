"""MkDocs hook: pages from outside docs/, links, and formulas without JavaScript."""

from __future__ import annotations

import html
import io
import logging
import os
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser
from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.hooks.links")  # of mkdocs: with --strict a warning is an error
ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/**/*.md", "benchmarks/plots/*.png")
FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
NOTEBOOK_LINK = re.compile(r'href="([\w/-]+\.md)(#[^"]*)?"')
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>~?([\w.]+)</code>")
FIGURE = re.compile(r"<td>([-+−]?\d[^<]{0,24})</td>")
POINTS = 12  # a formula's size, for text of 16 px


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that live beside the code."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links as GitHub has them into the site's; a link to code becomes its text."""
    source = page.file.src_uri
    outside = not (ROOT / "docs" / source).is_file()
    folder = (ROOT if outside else ROOT / "docs") / source

    def moved(link: re.Match[str]) -> str:
        text, target, heading = link[1], link[2], link[3] or ""
        path = os.path.relpath((folder.parent / target).resolve(), ROOT)
        uri = "README.md" if path == "README.md" else path.removeprefix("docs/")
        if (ROOT / path).is_dir():
            uri = f"{uri}/README.md"
        if files.get_file_from_path(uri) is None and (ROOT / path).exists():
            return text
        return f"[{text}]({os.path.relpath(uri, os.path.dirname(source) or '.')}{heading})"

    parts = FENCED.split(markdown)
    return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts))


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Draw formulas in the colour of the text, link names in docstrings, keep figures in a line."""
    package = "tfb_kernels." if page.file.src_uri == "reference/kernels.md" else "tfb."

    def linked(role: re.Match[str]) -> str:
        name = role[1] if role[1].startswith("tfb") else package + role[1]
        return f'<autoref identifier="{name}" optional><code>{role[1]}</code></autoref>'

    def to_page(link: re.Match[str]) -> str:
        if (found := files.get_file_from_path(link[1])) is None:
            log.warning("%s links to %s, which is not there", page.file.src_uri, link[1])
        return f'href="{link[1] if found is None else found.url}{link[2] or ""}"'

    if page.file.src_uri.endswith(".ipynb"):
        content = NOTEBOOK_LINK.sub(to_page, content)
    content = FORMULA.sub(lambda m: _formula(html.unescape(m[2]).strip(), m[1]), content)
    return FIGURE.sub(r'<td class="figure">\1</td>', ROLE.sub(linked, content))


def _formula(tex: str, tag: str) -> str:
    tex = tex.replace("\\frac", "\\dfrac") if tag == "div" else tex
    source = "$" + re.sub(r"\s+", " ", tex) + "$"
    font = FontProperties(size=POINTS, math_fontfamily="cm")
    width, height, depth, *_ = MathTextParser("path").parse(source, dpi=72, prop=font)
    figure = Figure(figsize=(width / 72, height / 72))
    figure.patch.set_visible(False)
    figure.text(0, depth / height, source, fontproperties=font)
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    drawn = written.getvalue()
    svg = re.sub(r"<(metadata|style).*?</\1>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    style = f"vertical-align: {-depth:.2f}pt"
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(tex)}" style="{style}"', 1)
    return f'<{tag} class="formula">{svg}</{tag}>'
