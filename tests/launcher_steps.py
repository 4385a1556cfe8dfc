"""Scenarios of tests/test_launcher.py: recipes whose steps are other than plans would have them."""

from typing import Any

from launcher_runs import (
    PLAIN,
    fake_gpu,
    forget,
    forward,
    tensors_of,
    torch,
    triton_forward,
)

from adalora_kernels.kernels.svd_linear import calls, plans


class planned:
    """A context in which every plan takes this path, where it can."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        self.choose = plans.choose
        forget()
        plans.choose = lambda device, problem, path, *rest: self.choose(
            device, problem, self.path, *rest
        )

    def __exit__(self, *error: object) -> None:
        plans.choose = self.choose
        forget()


def overlapping() -> None:
    """A kernel that may begin before the one in front of it has ended says so to the driver."""
    t = tensors_of(PLAIN)
    with fake_gpu.recorded() as launches:
        triton_forward(t, 0.0)
    expected = [launch.early for launch in launches]
    with fake_gpu.recorded() as launches:
        forward(t, 0.0)
    assert [launch.early for launch in launches] == expected == [False, *[True] * len(expected[1:])]
    assert len(expected) > 1
    assert [launch.attributes for launch in launches] == expected


def accumulated() -> None:
    """A product is added to what is in the output, in place, as in Triton's launcher."""
    t = tensors_of(PLAIN)

    def twice(*args: Any) -> Any:
        made = forward_recipe(*args)
        return made._replace(steps=(*made.steps, made.steps[-1]))

    with planned("cublas"):
        forward_recipe = calls.forward_recipe
        once = forward(t, 0.0)["y"]
        torch.testing.assert_close(once, t["x"] @ t["weight"].T, rtol=0, atol=0)
        forget()
        calls.forward_recipe = twice
        try:
            expected = torch.addmm(once, t["x"], t["weight"].T)
            assert torch.equal(forward(t, 0.0)["y"], expected)
            assert torch.equal(triton_forward(t, 0.0)["y"], expected)
        finally:
            calls.forward_recipe = forward_recipe
