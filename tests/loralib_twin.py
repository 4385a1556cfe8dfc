"""The authors' loralib, written out once more from its behaviour and the paper's equations.

Independent of the package under test: nothing here is imported from it.
"""

import torch
import torch.nn.functional as F
from torch import nn


class TwinLinear(nn.Linear):
    """y = x·Wᵀ + b + (dropout(x)·(A ⊙ E)ᵀ·Bᵀ)·scaling/(ranknum + 1e-5)."""

    def __init__(self, in_features, out_features, r=0, lora_alpha=1, fan_in_fan_out=False, **kw):
        super().__init__(in_features, out_features, **kw)
        self.fan_in_fan_out = fan_in_fan_out
        if r > 0:
            self.lora_A = nn.Parameter(self.weight.new_zeros(r, in_features))
            self.lora_E = nn.Parameter(self.weight.new_zeros(r, 1))
            self.lora_B = nn.Parameter(self.weight.new_zeros(out_features, r))
            self.ranknum = nn.Parameter(self.weight.new_full((1,), float(r)), requires_grad=False)
            self.weight.requires_grad = False
        self.scale = lora_alpha if lora_alpha > 0 else float(r)
        self.reset_parameters()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T

    def reset_parameters(self):
        super().reset_parameters()
        if hasattr(self, "lora_A"):
            nn.init.zeros_(self.lora_E)
            nn.init.normal_(self.lora_A, std=0.02)
            nn.init.normal_(self.lora_B, std=0.02)

    def forward(self, x):
        y = F.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        if hasattr(self, "lora_A"):
            low = x @ (self.lora_A * self.lora_E).T @ self.lora_B.T
            y = y + low * self.scale / (self.ranknum + 1e-5)
        return y


def twin_orth(model, weight):
    norms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append((gram - torch.eye(len(gram), dtype=p.dtype)).pow(2).sum().sqrt())
    return weight * sum(norms) / len(norms)


class TwinAllocator:
    """loralib's RankAllocator: `score <= kthvalue` is dropped, in every masking step."""

    def __init__(self, model, target, tinit, tfinal, interval, beta1, beta2, total_step):
        self.layers = [m for m in model.modules() if hasattr(m, "lora_E")]
        self.total = sum(len(m.lora_E) for m in self.layers)
        self.target = target * len(self.layers)
        self.tinit, self.tfinal, self.interval = tinit, tfinal, interval
        self.beta1, self.beta2, self.total_step = beta1, beta2, total_step
        self.state = {}

    @torch.no_grad()
    def update_and_mask(self, step):
        if step < self.total_step - self.tfinal:
            for layer in self.layers:
                for p in (layer.lora_A, layer.lora_E, layer.lora_B):
                    sensitivity, uncertainty = self.state.get(p, (0.0, 0.0))
                    ipt = (p * p.grad).abs()
                    sensitivity = self.beta1 * sensitivity + (1 - self.beta1) * ipt
                    spread = (ipt - sensitivity).abs()
                    uncertainty = self.beta2 * uncertainty + (1 - self.beta2) * spread
                    self.state[p] = sensitivity, uncertainty
        if step <= self.tinit:
            return self.total, None
        if step > self.total_step - self.tfinal:
            budget, masks = self.target, True
        else:
            span = self.total_step - self.tfinal - self.tinit
            decay = (1 - (step - self.tinit) / span) ** 3
            budget = int(self.target + (self.total - self.target) * decay)
            masks = step % self.interval == 0
        if not masks:
            return budget, None
        scores = []
        for layer in self.layers:
            s = [self.state[p][0] * self.state[p][1] for p in (layer.lora_A, layer.lora_B)]
            e = self.state[layer.lora_E][0] * self.state[layer.lora_E][1]
            scores.append(e.flatten() + s[0].mean(dim=1) + s[1].mean(dim=0))
        threshold = torch.kthvalue(torch.cat(scores), self.total - budget)[0].item()
        for layer, score in zip(self.layers, scores, strict=True):
            layer.lora_E[score <= threshold] = 0.0
        return budget, threshold
