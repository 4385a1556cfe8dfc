"""What makes the site of docs/: links of its pages, figures, and what it asks of the API."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def hook(name):
    """A module of docs/hooks."""
    if name != "figures":
        pytest.importorskip("mkdocs", reason='needs the extra "docs"')
    path = ROOT / "docs" / "hooks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_hooks_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LINKS = {
    # The page in the repository and in the site, its Markdown, and that of the site.
    "between pages": ("docs/torch.md", "torch.md", "[a](peft.md#b)", "[a](peft.md#b)"),
    "to a page outside": (
        *("docs/torch.md", "torch.md", "[a](../benchmarks/NOTES.md#b)"),
        "[a](repository/benchmarks/NOTES.md#b)",
    ),
    "to source": (
        *("docs/torch.md", "torch.md", "[a](../adalora_kernels/cpu.py)"),
        "[a](repository/adalora_kernels/cpu.py.md)",
    ),
    "to a folder": ("docs/quality.md", "quality.md", "[a](../benchmarks/results)", "a"),
    "from the home page": ("README.md", "index.md", "[a](docs/peft.md#b)", "[a](peft.md#b)"),
    "from outside": (
        *("benchmarks/NOTES.md", "repository/benchmarks/NOTES.md"),
        *("[a](RESULTS.md) [b](../README.md)", "[a](../../performance.md) [b](../../index.md)"),
    ),
    "to an image": (
        *("docs/quality.md", "quality.md", "![a](../benchmarks/charts/cpu_goals.png)"),
        "![a](repository/benchmarks/charts/cpu_goals.png)",
    ),
    "that are broken": ("docs/peft.md", "peft.md", "[a](nothing.md)", "[a](nothing.md)"),
    "that are none": ("docs/peft.md", "peft.md", "```\n[a](../setup.py)\n```", None),
    "to the web": ("docs/peft.md", "peft.md", "[a](https://arxiv.org/abs/2303.10512)", None),
}


@pytest.mark.parametrize(("path", "place", "text", "expected"), LINKS.values(), ids=LINKS.keys())
def test_links_lead_to_the_same_in_the_site(path, place, text, expected):
    pages = hook("pages")
    assert pages.with_links_of_the_site(text, path, place) == (expected or text)
    assert pages.place_in_site(path) == place and pages.place_in_repository(place) == path


INNER = """\
'''A module.'''

def there(a, *b):
    '''Do it.

    Args:
        a, b: known.
        c: gone.
    '''

def unlisted():
    '''Do nothing.'''

def bare():
    pass

def _own():
    pass
"""


def test_what_is_missing_in_the_api_is_found(tmp_path):
    api, package = hook("api"), tmp_path / "adalora_kernels"
    package.mkdir()
    (package / "inner.py").write_text(INNER)
    (package / "__init__.py").write_text(
        "'A package.'\nfrom .inner import there, unlisted\n__all__ = ['there', 'unlisted']\n"
    )
    assert list(api.faults(api.load(tmp_path), {"adalora_kernels.there"})) == [
        "adalora_kernels.inner.there has no argument c, of which its docstring speaks",
        "adalora_kernels.inner.bare has no docstring",
        "adalora_kernels.unlisted is not on the page api.md",
    ]


def test_figures_are_what_the_code_gives():
    """After a change of schedules, launches or bytes: python docs/hooks/figures.py."""
    figures = hook("figures")
    drawn = figures.drawings()
    assert {file.name: file.read_text() for file in figures.FOLDER.iterdir()} == drawn
