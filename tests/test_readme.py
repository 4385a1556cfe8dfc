"""The examples of README and docs run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/peft.md")}
EXAMPLES = {
    f"{name}: {title} {i}".strip(" 0"): code
    for name, page in PAGES.items()
    for title, _, body in (section.partition("\n") for section in re.split("\n###? ", page))
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", body, re.DOTALL))
}


def test_every_example_is_found():
    assert len(EXAMPLES) == sum(page.count("```python") for page in PAGES.values()) == 7


def test_examples_of_loops_are_short():
    for name, code in EXAMPLES.items():
        if name.startswith("docs"):
            lines = [line for line in code.splitlines() if line and "import" not in line]
            assert len(lines) <= 15, name


def test_links_lead_somewhere():
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page):
            assert (ROOT / name).parent.joinpath(target).exists(), f"{name}: {target}"


@pytest.mark.parametrize("code", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_example(code, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
