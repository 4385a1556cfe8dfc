"""Scenarios of tests/test_launcher.py: recipes whose steps are other than plans would have them."""

from collections.abc import Callable
from typing import Any

from launcher_runs import (
    PLAIN,
    compare,
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


class changed:
    """A context in which a function changes the arguments of every step of every recipe."""

    def __init__(self, change: Callable[[int, Any], dict[str, Any]]) -> None:
        self.change = change

    def __enter__(self) -> None:
        self.recipes = calls.forward_recipe, calls.backward_recipe
        forget()
        calls.forward_recipe, calls.backward_recipe = map(self._changed, self.recipes)

    def __exit__(self, *error: object) -> None:
        calls.forward_recipe, calls.backward_recipe = self.recipes
        forget()

    def _changed(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def recipe(*args: Any) -> Any:
            made = make(*args)
            steps = [
                step._replace(arguments={**step.arguments, **self.change(i, step)})
                for i, step in enumerate(made.steps)
            ]
            return made._replace(steps=tuple(steps))

        return recipe


def overlapping() -> None:
    """A kernel with launch_pdl, and no other, may begin before the one in front of it ends."""
    t = tensors_of(PLAIN)
    with planned("two_pass"), fake_gpu.recorded() as launches:
        forward(t, 0.0)
    assert [launch.early for launch in launches] == [False, True]
    assert [launch.attributes for launch in launches] == [0, 1]
    with planned("two_pass"), changed(lambda i, step: {"launch_pdl": False}):
        compare(PLAIN)
        with fake_gpu.recorded() as launches:
            forward(t, 0.0)
        assert [launch.early for launch in launches] == [False, False]


def accumulated() -> None:
    """A product is added to what is in the output, in place, as Triton's is."""
    t = tensors_of(PLAIN)

    def doubled(*args: Any) -> Any:
        # The fake GPU computes products alone; new memory is zero (tests/test_launcher.py).
        made = calls_forward(*args)
        (product,) = [step for step in made.steps if step.kernel is None]
        return made._replace(steps=(product, product))

    with planned("cublas"):
        calls_forward = calls.forward_recipe
        calls.forward_recipe = doubled
        try:
            once = torch.zeros(len(t["x"]), len(t["weight"]), dtype=t["x"].dtype)
            once.addmm_(t["x"], t["weight"].T)
            expected = torch.addmm(once, t["x"], t["weight"].T)
            assert not torch.equal(once, expected)
            torch.testing.assert_close(forward(t, 0.0)["y"], expected, rtol=0, atol=0)
            torch.testing.assert_close(triton_forward(t, 0.0)["y"], expected, rtol=0, atol=0)
        finally:
            calls.forward_recipe = calls_forward
