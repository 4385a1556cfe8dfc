"""The pages of the report: what the files of results give, and nothing else."""

import re
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import harness, report, results

ROOT = Path(__file__).resolve().parent.parent
MARKED = f"before\n{report.BEGIN}\n{report.END}\nafter\n"
# The seconds of each provider at a point: 1.1, 1.5, 1.1 and 2.1 times the baseline's are ours.
LAWS = {
    "F.linear": lambda x: 1e-3 * x,
    "PEFT": lambda x: 2e-3 * x,
    "loralib": lambda x: 2e-2,
    "ours": lambda x: 1e-3 * x * {1: 1.1, 10: 1.5, 100: 1.1, 1000: 2.1}[x],
}


def test_readme_and_results_are_those_of_the_committed_files(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


@pytest.fixture
def pages(tmp_path, capsys, monkeypatch):
    """Made-up results along a curve; called, runs the report over them."""
    run = results.Run({"device": "cpu", "processor": "made up", "packages": {"torch": "0.0"}})
    for point in (1, 10, 100, 1000):
        goals = {("ours", "time / F.linear"): "<= 1.12"} if point != 100 else {}
        case = harness.Case("work", {"K": 4, "M": point}, list(LAWS), goals, None, "M")
        outcome = harness.Outcome(case)
        seconds = {n: [of(point) * f for f in (0.9, 1, 1.1)] for n, of in LAWS.items()}
        outcome.seconds = pd.DataFrame({**seconds, "F.linear": LAWS["F.linear"](point)})
        outcome.compare("F.linear", "time / F.linear")
        outcome.add("ours", "dispatched ops", 3 * point)
        run.rows += outcome.rows
    run.wrong.append({"case": "work 7", "provider": "loralib", "why": "off by one"})
    run.not_reached.append("work 8")
    names = ("results/cpu.json", "RESULTS.md", "README.md")
    file, out, readme = (tmp_path / name for name in names)
    run.write(file)
    readme.write_text(MARKED)
    arguments = [f"--results={file.parent}", f"--out={out}", f"--readme={readme}"]

    def call(*flags, draw=False):
        if not draw:
            monkeypatch.setattr(report, "draw", lambda *_: None)
        status = report.main([*arguments, *flags])
        return status, out.read_text() if out.exists() else "", readme, capsys.readouterr()

    call.file, call.run = file, run
    return call


def test_goals_are_listed_those_missed_first(pages):
    status, page, readme, printed = pages()
    lines = [line for line in printed.out.splitlines() if re.match("MISSED|met|cpu: ", line)]
    assert status == 0 and "≤ 1.12" in lines[0] and "1.500 (1.425-1.575)" in lines[0]
    verdicts = ["MISSED", "MISSED", "met, within the spread"]
    said = ["cpu: WRONG loralib, work 7: off by one", "cpu: not reached: work 8"]
    assert [line.partition("  ")[0] for line in lines] == verdicts + said
    assert "- WRONG loralib, work 7: off by one" in page
    block = readme.read_text()
    assert block.startswith("before\n") and block.endswith("\nafter\n")
    assert "| 1 of 3 |" in block and "nothing yet." in block
    assert "2.100 (1.995-2.205), `ours`, K 4, M 1000" in block
    # No page holds a time.
    for text in (page, block, printed.out, (ROOT / "benchmarks" / "RESULTS.md").read_text()):
        assert re.findall(r"\d ?(?:ns|us|µs|ms|s|GB/s|TFLOP/s)\b", text) == []


def test_how_cost_grows_is_what_was_put_in(pages):
    page = pages()[1].partition("### work, over M: K 4")[2]
    rows = {
        line.split("`")[1]: line.split("|")[-2].strip()
        for line in page.splitlines()
        if " M^" in line
    }
    assert rows["F.linear"] == rows["PEFT"] == "M^1.00" and rows["loralib"] == "M^0.00"
    ops = next(line for line in page.splitlines() if "dispatched ops" in line)
    assert [cell.strip() for cell in ops.split("|")[3:7]] == ["3", "30", "300", "3,000"]


def test_check_writes_nothing_and_finds_a_changed_figure(pages):
    status, page, readme, printed = pages("--check")
    assert (status, page, readme.read_text()) == (1, "", MARKED)
    assert printed.out.count("is not what the results give") == 2
    assert pages()[0] == pages("--check")[0] == 0
    readme.write_text(readme.read_text().replace("2.100", "2.200"))
    status, _, _, printed = pages("--check")
    assert status == 1 and f"{readme} is not what the results give" in printed.out


@pytest.mark.parametrize("text", ["{", "[]", '{"environment": {}, "rows": [{"work": 1}]}'])
def test_a_broken_file_is_named(pages, text):
    assert results.Run.read(pages.file) == pages.run
    pages.file.write_text(text)
    status, page, _, printed = pages()
    assert (status, page) == (2, "")
    assert f"{pages.file} is no file of benchmark results" in printed.err


def test_charts_are_the_same_bytes_in_every_run(pages):
    drawn = []
    for _ in range(2):
        page = pages(draw=True)[1]
        files = (pages.file.parent.parent / "charts").iterdir()
        drawn.append({path.name: path.read_bytes() for path in files})
    assert drawn[0] == drawn[1] and all(f"](charts/{name})" in page for name in drawn[0])
    assert drawn[0].keys() >= {"cpu_curves.png"}
