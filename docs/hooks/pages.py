"""Brings into the site what the pages of docs/ link to, and what is made when it is built.

The pages are written to be read in the repository, too. So a link there is relative to the file
that has it, and may lead out of docs/. Whatever such links lead to comes into the site below
repository/: a page as a page, an image as an image, and source as a page that shows it. A link to a
folder becomes its text. The README is the home page, without the figures that the page about
performance has; these are made here by `benchmarks.report`, from benchmarks/results/.
"""

from __future__ import annotations

import posixpath
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"<!-- benchmarks: begin -->.*?<!-- benchmarks: end -->", re.DOTALL)
FIGURES = re.compile("<!-- performance: begin -->.*<!-- performance: end -->", re.DOTALL)
DRAWING = re.compile(r"^!\[(?P<text>[^\]]*)\]\((?P<target>figures/[^)]+\.svg)\)$", re.MULTILINE)
# Pages of the repository that are not below repository/ in the site. What is in the last one is
# also on the second, by the same functions.
HOME, PERFORMANCE, RESULTS = "README.md", "docs/performance.md", "benchmarks/RESULTS.md"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", "": "text"}
AS_THEY_ARE = (".png", ".json", ".svg")
# What `on_files` makes for `on_page_markdown`.
made: dict[str, str] = {}


def place_in_site(path: str) -> str:
    """Where a file of the repository is in the site, as the path of its source."""
    if path in (HOME, RESULTS):
        return "index.md" if path == HOME else place_in_site(PERFORMANCE)
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    place = f"repository/{path}"
    return place if path.endswith((".md", *AS_THEY_ARE)) else f"{place}.md"


def place_in_repository(place: str) -> str:
    """The file that a page of the site is made from."""
    if place == "index.md":
        return HOME
    path = place.removeprefix("repository/")
    if path == place:
        return f"docs/{place}"
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def outside_code(change: Callable[[str], str], text: str) -> str:
    """Change a page, but not its blocks of code."""
    done, end = "", 0
    for fence in FENCE.finditer(text):
        done += change(text[end : fence.start()]) + fence[0]
        end = fence.end()
    return done + change(text[end:])


def target_of(link: re.Match[str], path: str) -> str:
    """The file or folder of the repository that a link in the file `path` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link["target"]))


def with_links_of_the_site(text: str, path: str, place: str) -> str:
    """Make the links of a page, which is at `path` in the repository, those of `place`."""

    def rewritten(link: re.Match[str]) -> str:
        target = target_of(link, path)
        if (ROOT / target).is_dir():
            return link["text"][1:-1]
        if not (ROOT / target).exists():
            return link[0]  # mkdocs has the words for it.
        there = posixpath.relpath(place_in_site(target), posixpath.dirname(place) or ".")
        return f"{link['text']}({there}{link['anchor'] or ''})"

    return outside_code(lambda part: LINK.sub(rewritten, part), text)


def linked(text: str, path: str) -> Iterator[str]:
    """The files of the repository that a page links to, out of docs/."""
    targets = {target_of(link, path) for link in LINK.finditer(FENCE.sub("", text))}
    for target in sorted(targets - {HOME, RESULTS}):
        if not target.startswith(("docs/", "../")) and (ROOT / target).is_file():
            yield target


def shown(path: str) -> str:
    """A page that shows a file which is none."""
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"# {path}\n\n````{language}\n{(ROOT / path).read_text()}````\n"


def performance() -> tuple[str, dict[str, bytes]]:
    """All figures, with the links of RESULTS.md, and the charts by their names."""
    sys.path.insert(0, str(ROOT))
    from benchmarks import report
    from benchmarks.results import FOLDER, Run

    runs = {file.stem: Run.read(file) for file in sorted(FOLDER.glob("*.json"))}
    page = report.results_page(runs, FOLDER, ROOT / RESULTS).partition("\n")[2]
    with tempfile.TemporaryDirectory() as folder:
        for name, run in runs.items():
            report.draw(run.frame, Path(folder), name)
        charts = {chart.name: chart.read_bytes() for chart in Path(folder).iterdir()}
    # Else what is in it would not be read as Markdown.
    page = page.replace("<details>", '<details markdown="1">')
    intro, _, rest = page.partition("\n## ")
    return f"{intro}\n## In short\n\n{report.summary(runs)}\n## {rest}", charts


def nav_of(entry: Any) -> Iterator[str]:
    """The paths in a nav."""
    if isinstance(entry, str):
        yield entry
    else:
        for value in entry.values() if isinstance(entry, dict) else entry or []:
            yield from nav_of(value)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the home page, the charts, and whatever is linked to, and to by that."""

    def add(place: str, **content: Any) -> None:
        file = File.generated(config, place, **content)
        if place not in nav:
            file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)

    nav = set(nav_of(config.nav))
    figures, charts = performance()
    for name, content in charts.items():
        add(f"repository/benchmarks/charts/{name}", content=content)
    pages = {f"docs/{f.src_uri}": f.content_string for f in files.documentation_pages()}
    pages[HOME] = BLOCK.sub(
        f"All of it is on the page about [performance]({PERFORMANCE}).", (ROOT / HOME).read_text()
    )
    add("index.md", content=pages[HOME])
    made[PERFORMANCE] = with_links_of_the_site(figures, RESULTS, place_in_site(PERFORMANCE))
    pages[RESULTS] = figures
    seen = {f"benchmarks/charts/{name}" for name in charts}
    waiting = [place_in_repository(place) for place in nav if place.startswith("repository/")]
    while pages or waiting:
        for path, text in pages.items():
            waiting += linked(text, path)
        pages = {}
        for path in dict.fromkeys(waiting):
            if path in seen or not (ROOT / path).is_file():
                continue
            if path.endswith(".md"):
                pages[path] = (ROOT / path).read_text()
                add(place_in_site(path), content=pages[path])
            elif path.endswith(AS_THEY_ARE):
                add(place_in_site(path), content=(ROOT / path).read_bytes())
            else:
                add(place_in_site(path), content=shown(path))
            seen.add(path)
        waiting = []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links, and put in what is made here."""
    place = page.file.src_uri
    path = place_in_repository(place)
    if place.startswith("repository/"):
        page.meta["search"] = {"boost": 0.3}
    if not path.endswith(".md"):
        return markdown
    markdown = with_links_of_the_site(markdown, path, place)
    if path == PERFORMANCE:
        page.meta["hide"] = ["toc"]  # for the width of its tables
        markdown = FIGURES.sub(lambda _: made[path], markdown)
    return DRAWING.sub(drawn, markdown)


def drawn(figure: re.Match[str]) -> str:
    """The drawing itself, which has the colours of the page then, and not those of the system."""
    svg = (ROOT / "docs" / figure["target"]).read_text().strip()
    return f'<figure class="figure" aria-label="{figure["text"]}">{svg}</figure>'
