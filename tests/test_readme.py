"""The examples of README and docs run as they stand, and links lead somewhere."""

import ast
import builtins
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = {
    str(file.relative_to(ROOT)): file.read_text()
    for file in [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
# "docs/start.md: Trainer": the example under that heading.
EXAMPLES = {
    f"{name}: {title} {i}".strip(" 0"): code
    for name, page in PAGES.items()
    for title, _, body in (section.partition("\n") for section in re.split("(?:^|\n)##* ", page))
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", body, re.DOTALL))
}


def anchors(page):
    """Return the anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def missing_imports(code):
    """Names that an example uses and never binds, and modules of ours that it does not import."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {n.name for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.asname is None}
    used = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    ours = {match[0] for u in used if (match := re.match(r"adalora_kernels\.\w+", u))}
    return ({node.id for node in names} - bound) | (ours - modules)


def test_every_example_is_found():
    assert len(EXAMPLES) == sum(page.count("```python") for page in PAGES.values()) == 10
    tags = {tag for page in PAGES.values() for tag in re.findall(r"^```(\w*)$", page, re.MULTILINE)}
    assert tags == {"", "python", "bash"}, "code under another name would not be run"


@pytest.mark.parametrize("code", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_examples_have_their_imports(code):
    """Also those that another module happens to have imported."""
    assert missing_imports(code) == set()
    imports = [i for i, line in enumerate(code.splitlines()) if re.match("import |from ", line)]
    for i in imports:
        lines = code.splitlines()
        assert missing_imports("\n".join(lines[:i] + lines[i + 1 :])), lines[i]


def test_examples_of_loops_are_short():
    for name, code in EXAMPLES.items():
        if name.startswith("docs/start.md"):
            lines = [line for line in code.splitlines() if line and "import" not in line]
            assert len(lines) <= 15, name


def test_readme_is_short_beside_the_generated_block():
    before, rest = README.read_text().split("<!-- benchmarks: begin -->")
    assert len((before + rest.split("<!-- benchmarks: end -->")[1]).splitlines()) <= 120


def test_links_lead_somewhere():
    for name, page in PAGES.items():
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page):
            file = (ROOT / name).parent / target if target else ROOT / name
            assert file.exists(), f"{name}: {target}"
            assert not anchor or anchor in anchors(file.read_text()), f"{name}: {target}#{anchor}"


@pytest.mark.parametrize("code", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_example(code, tmp_path, monkeypatch):
    """In this process, which has imported torch and transformers already, but in fresh names."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})


@pytest.mark.full
@pytest.mark.parametrize("code", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_example_in_a_process_of_its_own(code, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
