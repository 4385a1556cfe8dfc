"""Plans: the arithmetic, the tables, and when each is used."""

import json

import pytest
import torch

from adalora_kernels.kernels.svd_linear import plans
from adalora_kernels.kernels.svd_linear.plans import Blocks, Device, Plan, Problem

BF16 = torch.bfloat16
H200 = Device("NVIDIA H200", "sm_90", 132)
A100 = Device("NVIDIA A100", "sm_80", 108)


@pytest.fixture(autouse=True)
def no_user_table(tmp_path, monkeypatch):
    monkeypatch.setenv("ADALORA_KERNELS_CACHE", str(tmp_path))
    plans.forget_tables()
    yield
    plans.forget_tables()


# Device, problem, and the path by the arithmetic of design.md, section 5.
EXPECTED = {
    "one_row": (H200, Problem(BF16, 1, 4096, 4096, 16, "y"), "two_pass"),
    "64_rows": (H200, Problem(BF16, 64, 4096, 4096, 16, "y"), "two_pass"),
    "64_rows_dx": (H200, Problem(BF16, 64, 4096, 4096, 16, "dx"), "two_pass"),
    "65_rows": (H200, Problem(BF16, 65, 4096, 4096, 16, "y"), "two_pass"),
    "1024_rows": (H200, Problem(BF16, 1024, 4096, 4096, 16, "y"), "fused"),
    "too_few_that_can_make_h": (H200, Problem(BF16, 4096, 2048, 2048, 16, "y"), "two_pass"),
    "many_rows": (H200, Problem(BF16, 8192, 4096, 4096, 16, "y"), "fused"),
    "many_rows_dx": (H200, Problem(BF16, 8192, 4096, 4096, 16, "dx"), "two_pass"),
    "many_ranks": (H200, Problem(BF16, 8192, 4096, 4096, 64, "y"), "two_pass"),
    "wide": (H200, Problem(BF16, 8192, 4096, 14336, 16, "y"), "fused"),
    "float32": (H200, Problem(torch.float32, 8192, 4096, 4096, 16, "y"), "cublas"),
    "a100": (A100, Problem(BF16, 8192, 4096, 4096, 16, "y"), "cublas"),
    "a100_one_row": (A100, Problem(BF16, 1, 4096, 4096, 16, "y"), "two_pass"),
}


@pytest.mark.parametrize(("device", "problem", "path"), EXPECTED.values(), ids=EXPECTED.keys())
def test_arithmetic(device, problem, path):
    assert plans.choose(device, problem).path == path


def test_a_named_path_is_taken_where_it_can_be():
    problem = Problem(BF16, 8192, 4096, 4096, 16, "y")
    assert plans.choose(H200, problem, "cublas").path == "cublas"
    assert plans.choose(H200, problem, "cublas", ("two_pass",)).path == "two_pass"
    assert plans.choose(H200, problem, "fused", ("two_pass", "cublas")).path == "two_pass"
    assert plans.choose(H200, problem._replace(M=64), "fused").path == "two_pass"
    assert plans.choose(H200, problem, MEASURED) == MEASURED
    with pytest.raises(ValueError, match=r"path must be 'auto' or one of .*, got 'three_pass'"):
        plans.choose(H200, problem, "three_pass")


@pytest.mark.parametrize(
    ("M", "N", "tile"),
    [
        (8192, 4096, (128, 256)),
        (2048, 1024, (128, 128)),
        (100, 1024, (64, 64)),
        (64, 14336, (64, 128)),
        (64, 4096, (64, 64)),
        (1, 14336, (16, 64)),
        (1, 4096, (16, 32)),
    ],
)
def test_tiles_keep_the_gpu_busy(M, N, tile):
    plan = plans.choose(H200, Problem(BF16, M, 4096, N, 16, "y"), "two_pass")
    assert (plan.gemm.m, plan.gemm.n) == tile


@pytest.mark.parametrize("M", [1, 8192])
def test_operands_that_are_not_aligned_are_for_cublas(M):
    problem = Problem(BF16, M, 4097, 4096, 16, "y")
    assert plans.choose(H200, problem, aligned=False).path == "cublas"
    forced = plans.choose(H200, problem, "two_pass", aligned=False)
    assert forced == Plan("two_pass", plans.GEMM_GENERAL)


def test_every_family_has_its_tables():
    assert plans.CEILINGS.keys() == plans.GEMM.keys() == plans.FEW_ROWS.keys()


PROBLEM = Problem(BF16, 8192, 4096, 4096, 16, "y")
MEASURED = Plan("cublas", Blocks(64, 64, 32, 4, 2))


def test_a_measured_plan_comes_first():
    plans.write_table(plans.cache_path(), H200.name, {PROBLEM: MEASURED})
    assert plans.choose(H200, PROBLEM) == MEASURED
    assert plans.choose(H200, PROBLEM._replace(M=5000)) == MEASURED, "M counts by powers of two"
    assert plans.choose(H200, PROBLEM._replace(M=8193)) != MEASURED
    assert plans.choose(H200, PROBLEM._replace(product="dx")) != MEASURED
    assert plans.choose(H200._replace(name="another"), PROBLEM) != MEASURED
    assert plans.choose(H200, PROBLEM, "two_pass") != MEASURED
    assert plans.choose(H200, PROBLEM, aligned=False) != MEASURED


def test_the_users_table_comes_before_the_shipped_one(monkeypatch, tmp_path):
    shipped, other = tmp_path / "shipped" / "launch_table.json", PROBLEM._replace(K=2048)
    slower = Plan("two_pass", MEASURED.gemm)
    plans.write_table(shipped, H200.name, {PROBLEM: slower, other: slower})
    plans.write_table(plans.cache_path(), H200.name, {PROBLEM: MEASURED})
    monkeypatch.setattr(plans, "_SHIPPED", shipped)
    assert plans.choose(H200, PROBLEM) == MEASURED
    assert plans.choose(H200, other) == slower


def test_writing_replaces_the_same_problem_only():
    path = plans.cache_path()
    other = PROBLEM._replace(K=2048)
    plans.write_table(path, H200.name, {PROBLEM: MEASURED, other: MEASURED})
    faster = Plan("two_pass", MEASURED.gemm)
    plans.write_table(path, H200.name, {PROBLEM: faster})
    assert plans.read_table(path, H200.name) == {PROBLEM: faster, other: MEASURED}
    assert len(json.loads(path.read_text())["entries"]) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"entries": [{}]}',
        '{"entries": [{"device": "NVIDIA H200", "path": "cublas"}]}',
    ],
)
def test_a_file_that_is_no_table_is_named(content):
    plans.cache_path().write_text(content)
    with pytest.raises(ValueError, match=r"launch_table\.json is not a launch table"):
        plans.choose(H200, PROBLEM)


def test_the_shipped_table_can_be_read():
    plans.read_table(plans._SHIPPED, H200.name)


def test_where_the_users_table_is(monkeypatch, tmp_path):
    monkeypatch.delenv("ADALORA_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plans.cache_path() == tmp_path / "adalora_kernels" / "launch_table.json"


def test_bucket():
    assert [plans.bucket(M) for M in (1, 2, 3, 64, 65, 8192)] == [1, 2, 4, 64, 128, 8192]
