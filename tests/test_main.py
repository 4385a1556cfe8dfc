"""`python -m adalora_kernels`."""

import torch

from adalora_kernels import __main__ as report
from adalora_kernels import cpu, launching, ops


def test_report(capsys):
    assert report.main() == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in out
    assert "self-check passed" in out
    for implementation in ops.implementations("cpu"):
        assert f"{implementation.op} " in out


def test_the_report_says_who_launches(capsys, monkeypatch):
    for why, by in (
        (None, "the compiled library, in one call per layer"),
        ("of a test", "Triton, because of a test"),
    ):
        monkeypatch.setattr(launching, "why_not_library", lambda why=why: why)
        assert report.main() == 0
        assert f"kernels of a layer on a GPU are launched by {by}\n" in capsys.readouterr().out


def test_a_wrong_op_fails_the_self_check(capsys, monkeypatch):
    right = report.functional.svd_linear

    def wrong(**arguments):
        y = right(**arguments)
        return y * 1.001 if arguments["impl"] == "auto" else y

    monkeypatch.setattr(report.functional, "svd_linear", wrong)
    assert report.main() == 1
    assert "TOO LARGE" in capsys.readouterr().out


def test_nan_fails_the_self_check(capsys, monkeypatch):
    right = cpu.svd_linear_backward

    def wrong(*args):
        return tuple(g * float("nan") for g in right(*args))

    monkeypatch.setattr(cpu, "svd_linear_backward", wrong)
    assert report.main() == 1
    assert "self-check FAILED" in capsys.readouterr().out
