"""The examples of README and docs run as they stand, and links lead somewhere."""

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
# "docs/peft.md: Trainer": the example under that heading.
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


def test_every_example_is_found():
    assert len(EXAMPLES) == sum(page.count("```python") for page in PAGES.values()) == 8


def test_examples_of_loops_are_short():
    for name, code in EXAMPLES.items():
        if name.startswith("docs/peft.md"):
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
