"""What the site does beyond MkDocs: links that leave docs/, equations, roles of docstrings.

Pages in docs/ are written for a code host, whose links may point at any file of the checkout. In
the site README.md is the home page, CONTRIBUTING.md a page of its own, and every other file that
is linked to a page with its text, so that the site stands alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(#[^)\s]*)?(?=\))")
LANGUAGES = {".py": "python", ".sh": "bash", ".yml": "yaml", ".toml": "toml", ".txt": "text"}
PAGES = {"README.md": "README.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the checkout beside docs/, and the pages of the site that stand for them."""


def page_of(path: str) -> str:
    """Name the page, below docs/, that shows a file of the checkout."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path) or f"source/{path}.md"


def targets(text: str, folder: str) -> dict[str, str]:
    """Find a page's relative links: as written, and as paths in the checkout."""
    return {found[1]: normpath(join(folder, found[1])) for found in LINK.finditer(text)}


def relinked(text: str, folder: str, page: str) -> str:
    """Point the links of a text, written in ``folder``, at the site's pages, as from ``page``."""

    def replace(found: re.Match[str]) -> str:
        target = page_of(normpath(join(folder, found[1])))
        return relpath(target, dirname(page) or ".") + (found[2] or "")

    return LINK.sub(replace, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the contributors' page, and a page for each file outside docs/ that a page links to."""
    texts = {"docs/" + f.src_uri: f.content_string for f in files.documentation_pages()}
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    texts["CONTRIBUTING.md"] = contributing
    content = relinked(contributing, ".", "contributing.md")
    files.append(File.generated(config, "contributing.md", content=content))
    linked = {
        path for page, text in texts.items() for path in targets(text, dirname(page)).values()
    }
    for path in sorted(linked):
        if path.startswith("docs/") or path in PAGES:
            continue
        if not (ROOT / path).is_file():
            raise PluginError(f"a page links to {path}, which is no file of the checkout")
        language = LANGUAGES.get(Path(path).suffix, "text")
        text = (ROOT / path).read_text()
        content = (
            f"---\ntitle: {Path(path).name}\nsearch: {{exclude: true}}\n"
            f"hide: [navigation, toc]\n---\n# {path}\n\n````{language}\n{text}````\n"
        )
        files.append(File.generated(config, page_of(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ at the site's pages."""
    if page.file.generated_by:
        return markdown
    return relinked(markdown, join("docs", dirname(page.file.src_uri)), page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    r"""Turn equations, ``\(...\)`` and ``\[...\]`` by now, into MathML, which browsers draw."""

    def replace(found: re.Match[str]) -> str:
        tex, display = found[2].strip(), found[1] == "div"
        tex = tex[2:-2].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        mathml = convert(tex, display="block" if display else "inline")
        if "\\" in mathml:  # a macro that the converter does not know
            raise PluginError(f"{page.file.src_uri}: no MathML for {tex}")
        return f'<{found[1]} class="equation">{mathml}</{found[1]}>'

    return re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', replace, html, flags=re.S)


class Roles(griffe.Extension):
    """Docstrings are in Google style with Sphinx roles; Markdown has code in their place."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Write ``:class:`X``` as ``X``, and ``Example:`` as the section that Griffe knows."""
        if obj.docstring:
            text = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
