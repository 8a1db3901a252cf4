"""What MkDocs alone does not do: links into the repository, formulas, shared pages."""

import html
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(\.\./[^)#]+)")
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL
)


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, **kwargs: Any
) -> str:
    """Links files outside docs/ in the repository, so that pages work there too.

    A page with `shows` in its front matter shows that file of the repository.
    """
    if shown := page.meta.get("shows"):
        markdown = (ROOT / shown).read_text()
        # Its links are relative to the root of the repository.
        markdown = re.sub(r"(?<=\]\()docs/", "", markdown)
        markdown = re.sub(r"(?<=\]\()(?=[A-Z]+\.md|[a-z_]+/)", "../", markdown)
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def absolute(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if path.startswith("docs/"):
            return match[1]
        if not os.path.exists(ROOT / path):
            raise PluginError(f"{page.file.src_uri} links to {path}, which is missing")
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{config.repo_url.rstrip('/')}/{kind}/main/{path}"

    return LINK.sub(absolute, markdown)


def on_page_content(content: str, **kwargs: Any) -> str:
    """Replaces LaTeX by MathML, which browsers draw without a script."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    return FORMULA.sub(mathml, content)
