"""Holds docs/api.md to the package: every public name is there, and everything has a docstring.

A module with `__all__` is public, and so are the names in it; in kernels/ it only says what the
other modules take from there. A docstring is asked of all modules, classes, functions and methods
whose names do not begin with an underscore.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGE, NOT_FOR_USERS = "api.md", "adalora_kernels.kernels"
log = get_plugin_logger("api")
anchors: set[str] = set()


def below(one: griffe.Object) -> Iterator[griffe.Object]:
    """It, and all modules, classes and functions in it whose names have no underscore in front."""
    yield one
    for name, member in one.members.items():
        if not member.is_alias and not name.startswith("_") and not member.is_attribute:
            yield from below(member)


def public_names(package: griffe.Object) -> Iterator[tuple[str, griffe.Object]]:
    """Every name in an `__all__`, as it is imported, and what it stands for."""
    for module in below(package):
        if module.is_module and module.exports and not module.path.startswith(NOT_FOR_USERS):
            for name in map(str, module.exports):
                if name.startswith("_"):
                    continue
                found = module.members[name]
                yield f"{module.path}.{name}", found.final_target if found.is_alias else found


def unknown_arguments(one: griffe.Object) -> Iterator[str]:
    """What stands under "Args:" in a docstring, and is no argument."""
    # What an __init__ of torch's takes is not known here.
    inherits_init = one.is_class and "__init__" not in one.all_members
    if one.docstring is None or one.is_module or inherits_init:
        return
    known = {p.name.lstrip("*") for p in getattr(one, "parameters", [])} | set(one.all_members)
    for section in one.docstring.parse("google", warnings=False):
        if section.kind == griffe.DocstringSectionKind.parameters:
            for item in section.value:
                # Several that belong together stand in one line.
                yield from set(re.split(r",\s*", item.name.replace("*", ""))) - known


def faults(package: griffe.Object, anchors: set[str]) -> Iterator[str]:
    """What is missing in the package, and on the page, which has these anchors."""
    inside = (anchor.partition(".")[2] for anchor in anchors)
    documented = {package[name].canonical_path for name in inside if name}
    for one in below(package):
        if not one.has_docstring:
            yield f"{one.path} has no docstring"
        for name in sorted(unknown_arguments(one)):
            yield f"{one.path} has no argument {name}, of which its docstring speaks"
    for name, one in public_names(package):
        if not one.has_docstring:
            yield f"{name} has no docstring"
        if one.path not in documented:
            yield f"{name} is not on the page {PAGE}"


def load(folder: Path) -> griffe.Object:
    """The package in a folder, read and not imported."""
    return griffe.load(
        "adalora_kernels",
        search_paths=[str(folder)],
        try_relative_path=False,
        resolve_aliases=True,
    )


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Remember the anchors of the page."""
    if page.file.src_uri == PAGE:
        anchors.update(re.findall(r'id="(adalora_kernels[\w.]*)"', html))


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of everything that is missing, which stops a strict build."""
    for fault in dict.fromkeys(faults(load(ROOT), anchors)):
        log.warning(fault)
