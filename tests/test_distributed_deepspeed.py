"""DeepSpeed's ZeRO on several processes, against the same training in one process without it."""

import importlib.util
import re
from collections import Counter

import pytest
import torch
from ranks import on_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install 'adalora_kernels[deepspeed]'",
)
# DeepSpeed computes in float32. What differs from one process is the order in which the gradients
# of the ranks are added, and the flat tensors' division into vectors: 2⁻²⁴ in each of 30 steps, and
# of these errors Adam keeps the size relative to the gradient. Measured are at most 7e-8.
FLOAT32 = 30 * 2**-24
# A forward in half precision has this error.
HALF = {"bf16": 2**-8, "fp16": 2**-11}
CLIP, EVERY_PARAMETER_CUT = 0.05, {"stage3_param_persistence_threshold": 0}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
FP16 = {"enabled": True, "initial_scale_power": 20}
full = pytest.mark.full


# By the number of processes: the stage, and what `deepspeed_runs.train` is given.
FAST = {2: {"zero3": (3, {"accumulate": 2, "clip": CLIP, "zero": EVERY_PARAMETER_CUT})}}
CASES = {
    2: {
        "stage0": (0, {}),
        "zero1": (1, {}),
        "zero2": (2, {"clip": CLIP}),
        "zero2-offload": (2, {"clip": CLIP, "zero": {"offload_optimizer": {"device": "cpu"}}}),
        "zero2-other": (2, {"zero": {"contiguous_gradients": False, "reduce_scatter": False}}),
        "zero2-unused": (2, {"kind": "unused"}),
        "zero2-frozen": (2, {"kind": "frozen"}),
        "zero2-no-regulariser": (2, {"weight": 0.0, "accumulate": 2}),
        "zero2-bf16": (2, {"bf16": {"enabled": True}}),
        "zero2-fp16": (2, {"fp16": FP16, "clip": CLIP}),
        "zero2-norm": (2, {"importance": "norm"}),
        "zero3-norm": (3, {"importance": "norm", "clip": CLIP}),
        "zero3-offload": (3, {"clip": CLIP, "zero": OFFLOADED}),
        "zero3-frozen": (3, {"kind": "frozen"}),
        "zero3-no-regulariser": (3, {"weight": 0.0}),
        "zero3-bf16": (3, {"bf16": {"enabled": True}}),
        "zero3-fp16": (3, {"fp16": FP16, "clip": CLIP}),
    },
    4: {
        "zero2": (2, {"accumulate": 2, "clip": CLIP}),
        "zero3": (3, {"accumulate": 2, "zero": EVERY_PARAMETER_CUT}),
        "zero3-persistent": (3, {"clip": CLIP}),
        "zero3-unused": (3, {"kind": "unused", "clip": CLIP}),
    },
}


@pytest.fixture(autouse=True)
def _on_cpus(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def assert_same_everywhere(reports):
    assert len({r["digest"] for r in reports}) == 1, "the processes train different adapters"


def assert_as_alone(reports, options):
    """The training is that of one process, on each of them."""
    assert_same_everywhere(reports)
    bound = next((HALF[name] for name in HALF if name in options), FLOAT32)
    for r in reports:
        # Steps that DeepSpeed skipped, because 2²⁰ times the loss overflowed, do not count.
        assert (r["skipped"] > 0) == ("fp16" in options)
        assert r["summary"] == r["expected"] and r["summary"]["step"] == 30 - r["skipped"]
        assert r["same_pattern"] and 0 < r["summary"]["total_rank"] < r["summary"]["init_budget"]
        assert r["live"] == r["summary"]["total_rank"]
        for name in ("difference", "scores", "orth_reg"):
            assert abs(r[name]) <= bound, f"{name} is off by {r[name]:.1e}"


def test_a_training_is_that_of_one_process():
    for world, cases in FAST.items():
        for name, reports in by_case(world, cases).items():
            assert_as_alone(reports, cases[name][1])


def by_case(world, cases):
    """What each process reports, by the case. All are run by the same processes."""
    results = on_ranks(world, "deepspeed_runs:train_each", {"cases": cases}, seconds=400.0)
    return {name: [reports[name] for reports in results] for name in cases}


@full
@pytest.mark.parametrize("world", CASES)
def test_all_stages_and_options_train_as_one_process(world):
    failures = []
    for name, reports in by_case(world, CASES[world]).items():
        try:
            assert_as_alone(reports, CASES[world][name][1])
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    assert not failures, "\n".join(failures)


@full
@pytest.mark.parametrize(("world", "stages"), [(2, [2, 3]), (4, [3])], ids=str)
def test_a_training_goes_on_from_the_engines_checkpoint(tmp_path, world, stages):
    arguments = {"stages": stages, "folder": str(tmp_path), "zero": EVERY_PARAMETER_CUT}
    for by_stage in on_ranks(world, "deepspeed_runs:resume", arguments):
        for straight, resumed in by_stage.values():
            assert resumed == straight


@full
@pytest.mark.parametrize(("world", "stage", "accumulation"), [(2, 2, 1), (4, 3, 2)], ids=str)
def test_the_trainer_is_plain_peft_by_hand(tmp_path, world, stage, accumulation):
    arguments = {"stage": stage, "folder": str(tmp_path), "accumulation": accumulation}
    reports = on_ranks(world, "deepspeed_trainer_runs:train", arguments)
    assert_same_everywhere(reports)
    for r in reports:
        assert r["pattern"] == r["expected"]
        assert r["difference"] <= 1e-6, r["difference"]  # as in test_trainer.py
        torch.testing.assert_close(*r["saved"])
    logs = reports[0]["logs"]
    assert [log["adalora/budget"] for log in logs][::11] == [32, 16]
    assert all(log["adalora/orth_reg"] > 0 for log in logs)
    resumed = on_ranks(world, "deepspeed_trainer_runs:resume", arguments)
    assert_same_everywhere(reports + resumed)


@full
def test_accelerates_optimizer_can_be_attached_to():
    reports = on_ranks(2, "deepspeed_runs:by_accelerate", {"stage": 3})
    assert_same_everywhere(reports)
    assert reports[0]["same_pattern"] and reports[0]["difference"] <= FLOAT32


@full
def test_what_cannot_work_is_said():
    (said, other) = on_ranks(2, "deepspeed_runs:refusals")
    assert said == other
    expected = {
        "stage 0 in half precision": "ValueError: .*stage 0 in half precision: use stage 1, 2 or 3",
        "BF16_Optimizer": "ValueError: .*stage 1 in bf16 with data_types.grad_accum_dtype fp32",
        "round robin": "ValueError: .*round_robin_gradients is not supported",
        "float64": "ValueError: layers.0.lora_E is float64",
        "stage 0": "no error, attached",
        "stage 3": "no error, attached",
        "twice": "RuntimeError: attached to this engine already",
        "by hand": "RuntimeError: attached to an optimizer",
        "shrink": "RuntimeError: .*DeepSpeed's flat buffers",
        "too late": "ValueError: .*make the allocator before deepspeed.initialize",
        "state before attach": r"ValueError: .*attach\(engine\) after deepspeed.initialize",
        "no engine": r"ValueError: .*attach\(engine\) after deepspeed.initialize",
        "synced": "ValueError: sync_gradients is for processes",
        "not all": "ValueError: .*does not train one of those beside layers.1.lora_E",
        "no optimizer": "ValueError: .*DeepSpeedEngine that has no optimizer",
    }
    assert said.keys() == expected.keys()
    for name, message in expected.items():
        assert re.match(message, said[name]), said[name]


@full
@pytest.mark.parametrize("stage", [2, 3])
def test_no_more_is_sent_than_is_written(stage):
    """The formulas in distributed/deepspeed.py, as DeepSpeed counts its collectives."""
    counts = on_ranks(2, "deepspeed_runs:sent", {"stage": stage})[0]
    sizes = [(6, i, o) for i, o in ((16, 24), (24, 20), (20, 8))]
    entries = [n for r, i, o in sizes for n in (r * i, r, r * o)]
    P, n = sum(entries), 3 * 6
    for step in (3, 8, 24):  # not pruning, pruning, final
        ours = Counter(counts[True, step]) - Counter(counts[False, step])
        assert Counter(counts[False, step]) <= Counter(counts[True, step])
        if stage == 2:  # The masters are the parameters.
            gradients = Counter(("all_reduce", 4 * m) for m in entries)
            assert ours == (gradients if step != 24 else Counter())
            continue
        sent = [P - n] if step == 24 else [P, P - n, P]
        sent += [n] if step != 3 else []
        assert ours == Counter(("all_gather_into_tensor", 4 * m // 2) for m in sent)
