"""Transforms, exports, hooks and memory of torch around an AdaLoRA model.

Plain PEFT and ours run the same script side by side, wherever PEFT is right; where it is not, the
test says so.
"""

import contextlib
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from hands import (
    adamw,
    adapted,
    adapted_net,
    both_sides,
    both_sides_slowly,
    enabled,
    perturbed,
    take_over,
    tokens,
    trainable,
)
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

from adalora_kernels.peft import allocator_of, apply

# Transforms and exports


def perturbed_net(side, **options):
    model = perturbed(adapted_net(**options)).eval()
    take_over(side, model)
    return model, model.base_model.model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_of_a_gradient(dropout):
    """A gradient penalty, a Hessian product, MAML: ours and PEFT's agree."""
    results = []
    for side in ("peft", "ours"):
        model = perturbed(adapted(orth_reg_weight=0.0, lora_dropout=dropout))
        model.get_base_model().set_attn_implementation("eager")
        take_over(side, model)
        if dropout:  # PEFT draws another mask: only ours, that it is drawn once.
            torch.manual_seed(3)
        parameters = trainable(model)
        gradients = torch.autograd.grad(model(**tokens(1)).loss, parameters, create_graph=True)
        penalty = sum(g.square().sum() for g in gradients)
        penalty.backward()
        results.append([p.grad for p in parameters])
    for theirs, ours in zip(*results, strict=True):
        assert ours is not None and ours.isfinite().all()
        if not dropout:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "transform", ["grad", "per_sample", "jvp", "dual", "hessian", "jacrev", "vmap"]
)
def test_torch_func(transform):
    """torch.func over the model, and forward-mode AD by hand: ours and PEFT's agree."""
    results = []
    for side in ("peft", "ours"):
        _, net = perturbed_net(side)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
        # PEFT's scaling depends on the parameter ranknum; ours is a number.
        named = {k: v for k, v in net.named_parameters() if "ranknum" not in k}
        parameters = {k: v.detach() for k, v in named.items()}

        def loss(parameters, x, net=net):
            return functional_call(net, parameters, (x,)).square().sum()

        def of_E(lora_E, net=net, parameters=parameters, x=x, loss=loss):
            return loss({**parameters, "a.lora_E.default": lora_E}, x)

        lora_E = parameters["a.lora_E.default"]
        if transform == "grad":
            results.append(torch.func.grad(loss)(parameters, x))
        elif transform == "per_sample":
            one = torch.func.grad(lambda p, row, loss=loss: loss(p, row[None]))
            results.append(torch.func.vmap(one, (None, 0))(parameters, x))
        elif transform == "jvp":
            results.append(torch.func.jvp(net, (x,), (torch.ones_like(x),)))
        elif transform == "dual":
            with forward_ad.dual_level():
                y = forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x))))
                results.append((y.primal.clone(), y.tangent.clone()))
        elif transform == "hessian":
            results.append(torch.func.hessian(of_E)(lora_E))
        elif transform == "jacrev":
            results.append(torch.func.jacrev(net)(x))
        else:
            results.append(torch.func.vmap(net)(x[:, None]))
    torch.testing.assert_close(results[1], results[0])


def without_our_package(code):
    """Run code in a process in which our package can't be imported."""
    blocked = "import sys; sys.modules['adalora_kernels'] = None\n"
    result = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@both_sides_slowly
def test_a_traced_model_runs_without_the_package(side, tmp_path):
    _, net = perturbed_net(side)
    x = torch.randn(4, 8)
    expected = net(x)
    torch.jit.save(torch.jit.trace(net, x), tmp_path / "net.pt")
    torch.save(x, tmp_path / "x.pt")
    path = str(tmp_path)
    output = without_our_package(
        f"import torch; x = torch.load({path + '/x.pt'!r})\n"
        f"torch.save(torch.jit.load({path + '/net.pt'!r})(x), {path + '/y.pt'!r})"
    )
    assert output == ""
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), expected)


@both_sides_slowly
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program_has_plain_ops(side, dynamic):
    _, net = perturbed_net(side)
    x = torch.randn(4, 8)
    shapes = ({0: torch.export.Dim("batch", min=2)},) if dynamic else None
    program = torch.export.export(net, (x,), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(x), net(x))
    if dynamic:
        wide = torch.randn(9, 8)
        torch.testing.assert_close(program.module()(wide), net(wide))
    for exported in (program, program.run_decompositions()):
        assert not [n for n in exported.graph.nodes if "adalora" in str(n.target)]


@both_sides_slowly
def test_onnx(side, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, net = perturbed_net(side)
    x = torch.randn(4, 8)
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(x).detach())


# Memory, hooks, and what is refused


@pytest.mark.parametrize("side", ["peft", "ours", "enable"])
@pytest.mark.parametrize("stepped", ["by hand", "attached", "attached, optimizer kept"])
def test_a_deleted_model_is_freed_at_once(side, stepped):
    """Else the folds of a notebook run out of memory."""
    gc.disable()
    try:
        with enabled() if side == "enable" else contextlib.nullcontext():
            model = adapted()
        optimizer = adamw(model)
        if side == "ours":
            apply(model)
        if side != "peft" and stepped != "by hand":
            allocator_of(model).attach(optimizer)
        model(**tokens(1)).loss.backward()
        optimizer.step()
        if side == "peft" or stepped == "by hand":
            model.base_model.update_and_allocate(1)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        seen = weakref.ref(layer.base_layer.weight)
        if "kept" not in stepped:
            del optimizer
        del model, layer
        assert seen() is None
    finally:
        gc.enable()


@both_sides
@pytest.mark.parametrize("how", ["hook", "subclass", "patched", "pre_hook"])
def test_a_dropout_that_is_not_plain_is_called(side, how):
    model = perturbed(adapted(lora_dropout=0.2))
    take_over(side, model)
    calls = []
    dropouts = model.base_model.model.model.layers[0].self_attn.q_proj.lora_dropout
    if how == "hook":
        dropouts["default"].register_forward_hook(lambda *_: calls.append(1))
    elif how == "pre_hook":
        dropouts["default"].register_forward_pre_hook(lambda *_: calls.append(1))
    elif how == "patched":
        plain = dropouts["default"].forward
        dropouts["default"].forward = lambda x: (calls.append(1), plain(x))[1]
    else:

        class Noise(nn.Dropout):
            def forward(self, x):
                calls.append(1)
                return x + 0.1 * torch.randn_like(x)

        dropouts["default"] = Noise(0.2)
    model(**tokens(1)).loss.backward()
    assert calls == [1]


@both_sides
@pytest.mark.parametrize("how", ["save_on_cpu", "checkpointing"])
def test_activations_are_kept_elsewhere(side, how):
    """Offloaded to the host, or computed again: the gradients stay the same bits."""
    model = perturbed(adapted(lora_dropout=0.2))
    take_over(side, model)
    results = []
    for elsewhere in (False, True):
        context = contextlib.nullcontext()
        if elsewhere and how == "save_on_cpu":
            context = torch.autograd.graph.save_on_cpu()
        elif elsewhere:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        with context:
            loss = model(**tokens(1)).loss
        loss.backward()
        results.append([p.grad.clone() for p in trainable(model)])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_rank_pattern_of_lora_is_refused_ours():
    """PEFT's AdaLoRA trains with it, and overwrites it."""
    model = adapted(rank_pattern={"q_proj": 4})
    with pytest.raises((TypeError, ValueError), match="rank_pattern"):
        apply(model)
