"""Whole models under torch.func and second-order methods, ours and PEFT's."""

import copy

import pytest
import torch
from hands import adapted, adapted_net, perturbed, take_over
from torch import nn
from torch.autograd import forward_ad

from adalora_kernels import SVDLinear


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.a, self.b = SVDLinear(8, 16, r=4, **options), SVDLinear(16, 2, r=3, **options)
        for layer in (self.a, self.b):
            nn.init.normal_(layer.lora_E)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_per_sample_gradients_of_a_module():
    net, x = Net(), torch.randn(5, 8)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(net, parameters, (sample[None],)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        net.zero_grad()
        net(sample[None]).square().sum().backward()
        for name, p in net.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(grads[name][i], p.grad)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_ensemble(mode):
    nets, x = [getattr(Net(), mode)() for _ in range(3)], torch.randn(5, 8)
    skeleton = copy.deepcopy(nets[0]).to("meta")
    state = torch.func.stack_module_state(nets)
    y = torch.func.vmap(lambda s: torch.func.functional_call(skeleton, s, (x,)))(state)
    torch.testing.assert_close(y, torch.stack([net(x) for net in nets]))


def gradient_penalty(model, leaves, loss_of):
    """Of the loss: value, gradients, and the gradients of their norm."""
    loss = loss_of(model, {})
    grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    penalty = sum(g.square().sum() for g in grads)
    return loss, grads, torch.autograd.grad(penalty, list(leaves.values()))


def maml(model, leaves, loss_of):
    """The meta-gradient through two inner steps."""
    fast = leaves
    for _ in range(2):
        loss = loss_of(model, fast)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), grads, strict=True)}
    return torch.autograd.grad(loss_of(model, fast), list(leaves.values()))


@pytest.mark.parametrize("second_order", [gradient_penalty, maml], ids=lambda f: f.__name__)
def test_second_order_methods_through_a_model_of_peft(second_order):
    ids = torch.randint(0, 64, (2, 6))

    def loss_of(model, parameters):
        inputs = {"input_ids": ids, "labels": ids}
        return torch.func.functional_call(model, parameters, kwargs=inputs).loss

    results = []
    for side in ("ours", "peft"):
        model = perturbed(adapted())
        model.get_base_model().set_attn_implementation("eager")  # is differentiable twice
        take_over(side, model.double())
        leaves = {name: p for name, p in model.named_parameters() if "lora_" in name}
        results.append(second_order(model, leaves, loss_of))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "transform", ["grad", "per_sample", "jvp", "dual", "hessian", "jacrev", "vmap"]
)
def test_transforms_of_a_model_of_peft(transform):
    """torch.func over the model, and forward-mode AD by hand: ours and PEFT's agree."""
    results = []
    for side in ("peft", "ours"):
        model = perturbed(adapted_net()).eval()
        take_over(side, model)
        net = model.base_model.model
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
        # PEFT's scaling depends on the parameter ranknum; ours is a number.
        named = {k: v for k, v in net.named_parameters() if "ranknum" not in k}
        parameters = {k: v.detach() for k, v in named.items()}

        def loss(parameters, x, net=net):
            return torch.func.functional_call(net, parameters, (x,)).square().sum()

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
