"""The README's examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTIONS = [section.partition("\n") for section in README.split("\n## ")]
EXAMPLES = {
    title: code
    for title, _, body in SECTIONS
    for code in re.findall(r"```python\n(.*?)```", body, re.DOTALL)
}


def test_every_example_is_found():
    assert len(EXAMPLES) == README.count("```python") == 3


@pytest.mark.parametrize("code", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_example(code, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
