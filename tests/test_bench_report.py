"""The pages of the report: what the files of results give, and nothing else."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import (
    allocation_cases,
    allocation_rivals,
    charts,
    orth_reg_rivals,
    reading,
    report,
    results,
    svd_linear_rivals,
    train_step_rivals,
)

ROOT = Path(__file__).resolve().parent.parent
MARKED = "before\n<!-- benchmarks: begin -->\n<!-- benchmarks: end -->\nafter\n"


def test_readme_and_results_are_those_of_the_committed_files(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_figure_in_the_readme_is_found(tmp_path, capsys):
    copied = ("README.md", "benchmarks/RESULTS.md", "benchmarks/results")
    (tmp_path / "benchmarks").mkdir()
    readme, out, results = (tmp_path / path for path in copied)
    shutil.copytree(ROOT / copied[2], results)
    shutil.copy(ROOT / copied[1], out)
    arguments = ["--check", "--results", str(results), "--out", str(out), "--readme", str(readme)]
    text = (ROOT / "README.md").read_text()
    readme.write_text(text)
    assert report.main(arguments) == 0
    begin = text.index(report.BEGIN)
    digit = begin + re.search(r"\d(?=\.\d+ \()", text[begin:]).start()
    readme.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    assert report.main(arguments) == 1
    assert f"{readme} is not what the results give" in capsys.readouterr().out


def made_up(path, seconds, goals=(), key="M", points=(1, 10, 100, 1000), **others):
    """A file of results: for each rival what its seconds are at a point; the first is the floor."""
    environment = {
        "device": "cpu",
        "processor": "made up",
        "packages": {"torch": "0.0"},
        "ceilings": {"copy B/s": 1e9, "product op/s": 1e10, "dtype": "float32"},
    }
    run = results.Run(environment, **others)
    first, *_ = seconds
    for i, point in enumerate(points, 1):
        settings = {"K": 4, key: point, "dtype": "float32", "curve": key}
        for rival, of in seconds.items():
            # Quartiles a twentieth away from the median.
            timing = results.Timing.of(
                [of(point) * f for f in (0.9, 1, 1.1)], [seconds[first](point)] * 3
            )
            goal = ("<=", 1.12) if rival == "ours" and point in goals else None
            details = {"operations": 1e8 * i, "bytes": 1e7}
            measured = (f"time / {first}", timing.slower, goal, timing.seconds, details)
            run.rows.append(results.Row("work", settings, rival, *measured))
            run.rows.append(results.Row("work", settings, rival, "dispatched ops", 3 * i))
    run.write(path)
    return run


LAWS = {
    "F.linear": lambda x: 1e-3 * x,
    "PEFT": lambda x: 2e-3 * x,
    "loralib": lambda x: 2e-2,
    # 1.1, 1.5, 1.1 and 2.1 times the floor's.
    "ours": lambda x: 1e-3 * x * {1: 1.1, 10: 1.5, 100: 1.1, 1000: 2.1}[x],
}


class Folder:
    """Made-up results in `results`; called, runs the report over them."""

    def __init__(self, path, capsys):
        self.path, self.results, self._capsys = path, path / "results", capsys
        self.results.mkdir()
        self.readme, self.out = path / "README.md", path / "RESULTS.md"
        self.readme.write_text(MARKED)

    def __call__(self, *flags):
        """(exit status, RESULTS.md, the README, what was printed)."""
        paths = {"results": self.results, "out": self.out, "readme": self.readme}
        arguments = [f"--{name}={path}" for name, path in paths.items()]
        status = report.main([*arguments, *flags])
        page = self.out.read_text() if self.out.exists() else ""
        return status, page, self.readme.read_text(), self._capsys.readouterr()


@pytest.fixture
def drawn(tmp_path, capsys):
    """With the charts, which take their time."""
    return Folder(tmp_path, capsys)


@pytest.fixture
def pages(drawn, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    return drawn


def test_goals_are_listed_those_missed_first(pages):
    refused = [{"case": "work 7", "rival": "loralib", "why": "ArithmeticError: off by one"}]
    path = pages.results / "cpu.json"
    made_up(path, LAWS, goals=(1, 10, 1000), refused=refused, not_reached=["work 8"])
    status, page, readme, printed = pages()
    lines = printed.out.splitlines()
    assert status == 0
    assert [line.partition("  ")[0] for line in lines] == [
        "MISSED",
        "MISSED",
        "met, within the spread",
        "cpu: REFUSED loralib, work 7: ArithmeticError: off by one",
        "cpu: not reached: work 8",
    ]
    assert "≤ 1.12" in lines[0] and "1.500 (1.425-1.575)" in lines[0] and lines[0].endswith("cpu")
    table = page.partition("### Goals")[2].partition("###")[0]
    goals = [line for line in table.splitlines() if "≤ 1.12" in line]
    assert [line.split(" | ")[-1].strip(" |") for line in goals] == [
        "**MISSED**",
        "**MISSED**",
        "met, within the spread",
    ]
    assert all("time / F.linear" in line and "| 2.000 |" not in line for line in goals)
    assert "- REFUSED loralib, work 7: ArithmeticError: off by one" in page
    assert readme.startswith("before\n") and readme.endswith("\nafter\n")
    assert "**1 of 3**, 1 within the spread" in readme and "On a GPU: nothing yet." in readme
    assert "2.100 (1.995-2.205), `ours`, M 1000" in readme
    assert "1.100 (1.045-1.155), `ours`, M 1 |" in readme


def test_how_cost_grows_is_what_was_put_in(pages):
    made_up(pages.results / "cpu.json", LAWS)
    _, page, _, _ = pages()
    growth = page.partition("#### work, over M")[2]
    rows = {line.split("`")[1]: line for line in growth.splitlines() if " M^" in line}
    assert rows["F.linear"].endswith("| M^1.00 | none (within 1 %) |")
    assert rows["PEFT"].endswith("| M^1.00 | none (within 1 %) |")
    assert rows["loralib"].endswith("| M^0.00 | all of it (within 1 %) |")
    assert "| dispatched ops | `ours` | 3 | 6 | 9 | 12 |" in growth


def test_fits_are_exact_on_exact_points():
    points = [1, 8, 64, 512, 4096]
    straight = [(x, 3e-6 * (x + 120)) for x in points]
    assert reading.line(straight).fixed == pytest.approx(120)
    assert reading.line(straight).off == pytest.approx(0, abs=1e-9)
    proportional = [(x, 3e-6 * x) for x in points]
    assert reading.slope(proportional) == pytest.approx(1)
    assert reading.line(proportional).fixed == pytest.approx(0, abs=1e-9)
    assert reading.slope([(x, 5.0) for x in points]) == 0
    assert reading.line([(x, 5.0) for x in points]).fixed == float("inf")
    # The upper half only: the first two are of another law.
    assert reading.slope([(1, 9.0), (8, 9.0), *((x, x**2) for x in points[2:])]) == pytest.approx(2)
    # Less than nothing is no cost: a, b >= 0.
    assert reading.line([(1, 0.5), (2, 2.0), (4, 9.0)]).fixed == 0
    assert reading.line([(1, 9.0), (2, 2.0), (4, 0.5)]).fixed == float("inf")
    assert reading.slope(proportional[:1]) is None and reading.line(proportional[:2]) is None


def test_where_each_path_stops_winning(pages):
    made_up(pages.results / "cpu.json", LAWS)
    _, page, _, _ = pages()
    # PEFT takes 2, loralib 20, 2, 0.2, 0.02 times the floor's time.
    assert "| `ours` | faster 1–100; undecided 1,000 | faster 1–10; slower 100–1,000 |" in page
    assert "M: `ours` at 1–10; `loralib` at 100–1,000." in page


def test_a_ratio_within_the_rounds_is_preferred(tmp_path):
    run = made_up(tmp_path / "cpu.json", LAWS)
    row = next(row for row in run.rows if row.rival == "ours" and row.settings["M"] == 1000)
    paired = results.Spread(0.95, 0.94, 0.96)
    measure = "PEFT's time / time"
    run.rows.append(results.Row("work", row.settings, "ours", measure, paired))
    (curve,) = reading.curves(run)
    assert curve.verdict("ours", "PEFT", 1000) == "slower"
    assert curve.verdict("ours", "PEFT", 100) == "faster"
    assert curve.verdict("ours", "nobody", 100) is None


def test_points_that_are_no_numbers_have_ratios_only(pages):
    laws = {"F.linear": lambda x: 1.0, "PEFT": lambda x: 3.0, "ours": lambda x: 2.0}
    made_up(pages.results / "cpu.json", laws, key="kind", points=("wide", "tall"))
    _, page, _, _ = pages()
    assert "| time / F.linear | kind = wide | kind = tall |\n" in page
    assert "| `ours` | faster wide–tall |" in page and "grows as |" not in page


def test_no_page_holds_a_time(pages):
    made_up(pages.results / "cpu.json", LAWS, goals=(1, 10))
    _, page, readme, printed = pages()
    for text in (page, readme, printed.out, (ROOT / "benchmarks" / "RESULTS.md").read_text()):
        assert re.findall(r"\d ?(?:ns|us|µs|ms|s|GB/s|TFLOP/s)\b", text) == []


def test_speeds_are_shares_of_the_ceiling(pages):
    path = pages.results / "cpu.json"
    run = made_up(path, LAWS)
    row = results.Row("update", {"model": "toy"}, "ours", "GB/s at 24 B per entry", 0.8)
    run.rows.append(row)
    run.write(path)
    assert (
        "| who | GB/s at 24 B per entry / a copy's |\n|---|---|\n| `ours` | 0.800 |" in (pages()[1])
    )
    del run.environment["ceilings"]
    run.write(path)
    assert "GB/s" not in pages()[1]


def test_check_writes_nothing(pages):
    made_up(pages.results / "cpu.json", LAWS)
    status, page, readme, printed = pages("--check")
    assert (status, page, readme) == (1, "", MARKED)
    assert printed.out.count("is not what the results give") == 2
    assert pages()[0] == 0
    assert pages("--check")[0] == 0


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"rows": []}', json.dumps({"environment": {}, "rows": [{"case": "x"}]})]
)
def test_a_broken_file_is_named(pages, text):
    made_up(pages.results / "cpu.json", LAWS)
    broken = pages.results / "other.json"
    broken.write_text(text)
    status, page, readme, printed = pages()
    assert (status, page, readme) == (2, "", MARKED)
    assert f"{broken} is no file of benchmark results" in printed.err


def test_no_files_and_no_markers_are_said(pages):
    status, _, _, printed = pages()
    assert status == 2 and "has no files of results" in printed.err
    made_up(pages.results / "cpu.json", LAWS)
    pages.readme.write_text("no markers")
    status, page, _, printed = pages()
    assert (status, page) == (2, "") and "<!-- benchmarks: begin -->" in printed.err


def test_charts_are_the_same_bytes_in_every_run(drawn):
    made_up(drawn.results / "cpu.json", LAWS, goals=(1, 10))
    _, page, _, _ = drawn()
    folder = drawn.path / "charts"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == [f"cpu_{x}.png" for x in ("goals", "growth", "ratios", "roofline")]
    assert all(f"](charts/{name})" in page for name in first)
    drawn()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_rows_are_placed_under_the_ceilings(tmp_path):
    run = made_up(tmp_path / "cpu.json", LAWS)
    placed = {
        (row.rival, row.settings["M"]): (intensity, share)
        for intensity, share, row in charts.place(run)
    }
    # The roof is at 10 ms by the bytes; by the operations it is there at the first point, and
    # three times as high at the third.
    assert placed["F.linear", 1] == pytest.approx((10, 10))
    assert placed["PEFT", 100] == pytest.approx((30, 0.15))
    run.environment["ceilings"]["dtype"] = "bfloat16"
    assert list(charts.place(run)) == []
    del run.environment["ceilings"]
    assert list(charts.place(run)) == []


def test_who_is_ours_is_known():
    kind_of = reading.kind_of
    allocation, orth_reg = allocation_rivals, orth_reg_rivals
    steps, layers = train_step_rivals, svd_linear_rivals
    paths = (layers.AUTO, *layers.plans.PATHS, layers.LAYER, layers.APPLIED)
    for rival in (*allocation.OURS, *orth_reg.OURS, *steps.OURS, *paths):
        assert kind_of(rival) == "ours", rival
    theirs = (layers.PEFT, layers.COMPILED, layers.LORALIB, allocation.PEFT, steps.PEFT, steps.LORA)
    assert {kind_of(rival) for rival in theirs} == {"theirs"}
    plain = (allocation.REFERENCE, allocation.FOREACH, orth_reg.BATCHED, layers.REFERENCE)
    assert {kind_of(rival) for rival in plain} == {"plain"}
    floors = (layers.FLOOR, steps.FROZEN, allocation_cases.TRAFFIC)
    assert {kind_of(rival) for rival in floors} == {"floor"}
