"""Whole models under torch.func and second-order methods, ours and PEFT's."""

import copy

import pytest
import torch
from torch import nn

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


def peft_llama(ours):
    """PEFT's AdaLoRA over a small Llama whose attention is differentiable twice."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=4, **sizes))
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=12,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config)
    model.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_E" in name:
                p.normal_()
    if ours:
        from adalora_kernels.peft import apply

        apply(model)
    return model.double()


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
    for ours in (True, False):
        model = peft_llama(ours)
        leaves = {name: p for name, p in model.named_parameters() if "lora_" in name}
        results.append(second_order(model, leaves, loss_of))
    torch.testing.assert_close(*results)
