"""Scenarios of tests/test_launcher.py: graphs that are being captured, and the calls before."""

from typing import Any

from launcher_runs import (
    PLAIN,
    backward,
    fake_gpu,
    forget,
    forward,
    library,
    tensors_of,
    torch,
    triton_backward,
    triton_forward,
)

R = 12
MASKED = PLAIN._replace(R=R, mask=True, p=0.1)


def both(t: dict[str, Any], p: float = MASKED.p) -> None:
    assert forward(t, p)["y"] is not None
    assert backward(t, p, True)["dA"] is not None


def asked() -> tuple[int, int]:
    """How often a plan was missed, and code loaded."""
    return library().adalora_plan_misses(), fake_gpu.counts().loads


def captured_first() -> None:
    """A capture survives it that in it kernels are planned, compiled and loaded."""
    # No other scenario has such ranks, for which there are kernels of their own.
    problem = MASKED._replace(R=130)
    t = tensors_of(problem)
    forget()
    before = asked()
    with fake_gpu.capturing():
        both(t)
    after = asked()
    assert after[0] - before[0] == 2 and after[1] > before[1]
    # The mode of the thread is what it was, so that others' mistakes are still found.
    try:
        with fake_gpu.capturing():
            triton_forward(tensors_of(problem._replace(R=70)), problem.p)
    except RuntimeError as error:
        assert "operation not permitted when stream is capturing" in str(error)
    else:
        raise AssertionError("the fake driver loads in a capture")


def captured_later() -> None:
    """Nothing is planned, compiled or loaded in a second call, wherever a mask or a seed lies.

    Nor is memory allocated but by torch: the driver has no function that allocates any.
    """
    t = tensors_of(MASKED)
    masks = (torch.arange(16 * R) % 3 != 1).split(R)
    seeds = torch.arange(16).split(1)
    assert {m.data_ptr() % 16 for m in masks} == {0, 4, 8, 12}
    before = asked()
    both(t | {"mask": masks[0], "seed": seeds[0]})
    triton_forward(t | {"mask": masks[0], "seed": seeds[0]}, MASKED.p)
    assert asked() != before
    before = asked()
    with fake_gpu.capturing():
        for mask, seed in zip(masks, seeds, strict=True):
            both(tensors_of(MASKED) | {"mask": mask, "seed": seed})
            triton_forward(t | {"mask": mask, "seed": seed}, MASKED.p)
            triton_backward(t | {"mask": mask, "seed": seed}, MASKED.p, True)
        # What a mask says, and what pruning writes into lora_E, is no part of any plan.
        t["E"].zero_()
        both(t | {"mask": torch.zeros(R, dtype=torch.bool)})
    assert asked() == before
