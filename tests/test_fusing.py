"""Which dropout modules become part of an op, and how a call is recorded."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from adalora_kernels.fusing import autocast_dtype, fused_dropout_p, is_exporting, is_unhooked


class OwnDropout(nn.Dropout):
    pass


def patched():
    module = nn.Dropout(0.25)
    module.forward = lambda x: x
    return module


def hooked(register):
    module = nn.Dropout(0.25)
    getattr(module, register)(lambda *args: None)
    return module


HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Identity(), 0.0),
        (nn.Dropout(0.25), 0.25),
        (nn.Dropout(0.0), 0.0),
        (nn.Dropout(0.25).eval(), 0.0),
        (nn.Dropout(1.0), None),
        (nn.Dropout(0.25, inplace=True), None),
        (nn.AlphaDropout(0.25), None),
        (nn.Sequential(nn.Dropout(0.25)), None),
        (OwnDropout(0.25), None),
        (OwnDropout(0.25).eval(), None),
        (patched(), None),
    ],
    ids=str,
)
def test_which_dropout_is_fused(module, expected):
    assert fused_dropout_p(module) == expected


@pytest.mark.parametrize("register", HOOKS)
def test_hooked_modules_are_called(register):
    module = hooked(register)
    assert not is_unhooked(module) and fused_dropout_p(module) is None
    assert fused_dropout_p(module.eval()) is None, "hooks see evaluation, too"
    assert is_unhooked(nn.Dropout(0.25))


def test_it_compiles_as_one_graph():
    module = nn.Dropout(0.25)
    run = torch.compile(lambda x: x + fused_dropout_p(module), fullgraph=True, backend="eager")
    assert torch.equal(run(torch.zeros(2)), torch.full((2,), 0.25))


def test_hooks_on_all_modules_are_seen():
    handle = register_module_forward_pre_hook(lambda *args: None)
    try:
        assert not is_unhooked(nn.Linear(2, 2))
    finally:
        handle.remove()
    assert is_unhooked(nn.Linear(2, 2))


def test_a_class_with_another_forward_is_seen(monkeypatch):
    monkeypatch.setattr(nn.Dropout, "forward", lambda module, x: x)
    assert fused_dropout_p(nn.Dropout(0.25)) is None
    assert is_unhooked(nn.Linear(2, 2))


def test_the_dtype_of_autocast(monkeypatch):
    assert autocast_dtype("cpu") is None and autocast_dtype("meta") is None
    # Torch.compile of torch 2.11 cannot trace this question.
    monkeypatch.delattr(torch.amp, "is_autocast_available")
    assert autocast_dtype("cpu") is None and autocast_dtype("cuda") is None
    with torch.autocast("cpu", dtype=torch.float16):
        assert autocast_dtype("cpu") == torch.float16
        with torch.autocast("cpu", enabled=False):
            assert autocast_dtype("cpu") is None


class Asks(nn.Module):
    def forward(self, x):
        return x + 1 if is_exporting() else x - 1


def test_what_is_compiled_is_not_exported(monkeypatch):
    # So it is under torch.compile of torch 2.11.
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    x = torch.zeros(2)
    assert torch.equal(torch.compile(Asks(), fullgraph=True, backend="eager")(x), x - 1)
    for strict in (False, True):
        assert torch.equal(torch.export.export(Asks(), (x,), strict=strict).module()(x), x + 1)
    assert torch.equal(Asks()(x), x - 1)
