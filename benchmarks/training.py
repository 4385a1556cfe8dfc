"""Models in training: without an adapter, with LoRA and AdaLoRA in PEFT, and with ours.

All start from the same weights and see the same batch. LoRA and AdaLoRA have PEFT's default ranks
(8; 12 to 8), and AdaLoRA masks in every step, PEFT's default, too (deltaT=1).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor

import adalora_kernels
import adalora_kernels.peft
from benchmarks.harness import check

FROZEN, LORA, PEFT = "no adapter", "LoRA in PEFT", "AdaLoRA in PEFT"
APPLIED, COMPILED, CAPTURED = "peft.apply", "peft.apply, torch.compile", "peft.apply, CUDA graph"
OURS = (APPLIED, COMPILED, CAPTURED)
# So long that every step of a bench is one of the budgeting phase.
_SCHEDULE = {"tinit": 0, "tfinal": 10, "deltaT": 1, "total_step": 1_000_000}
_ORTH_REG_WEIGHT, _LEARNING_RATE = 0.5, 1e-4


@dataclass(frozen=True, eq=False)
class Architecture:
    """A transformers model with random weights; no batch of it is longer than `longest`."""

    name: str
    model: Any
    config: Any
    task_type: str
    target_modules: tuple[str, ...]
    longest: int

    def batch(self, rows: int, tokens: int, device: torch.device) -> Mapping[str, Tensor]:
        """Draw random tokens, to predict them, or one of two classes for each row."""
        generator = torch.Generator(device).manual_seed(0)
        new = partial(torch.randint, generator=generator, device=device)
        ids = new(0, self.config.vocab_size, (rows, tokens))
        labels = ids if self.task_type == "CAUSAL_LM" else new(0, 2, (rows,))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _llama(name: str, **sizes: int) -> Architecture:
    """Describe Llama-3.2-1B, but for the sizes."""
    config = transformers.LlamaConfig(
        **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192}
        | {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"max_position_embeddings": 131072, "tie_word_embeddings": True, "use_cache": False}
        | sizes
    )
    seven = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return Architecture(name, transformers.LlamaForCausalLM, config, "CAUSAL_LM", seven, 4096)


def _deberta(name: str, layers: int, vocabulary: int) -> Architecture:
    """Describe DeBERTa-v3-base, but for the sizes, and without its own dropout.

    That would be the same work for every provider, and would hide a wrong gradient.
    """
    config = transformers.DebertaV2Config(
        **{"vocab_size": vocabulary, "hidden_size": 768, "intermediate_size": 3072}
        | {"num_hidden_layers": layers, "num_attention_heads": 12, "type_vocab_size": 0}
        | {"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm"}
        | {"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
        | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    )
    # The six that the paper adapts: "output.dense" ends two names.
    six = ("query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense")
    model = transformers.DebertaV2ForSequenceClassification
    return Architecture(name, model, config, "SEQ_CLS", six, 512)


_SMALL = {"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 2048}
_SMALL |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
LLAMA, SMALL_LLAMA = _llama("Llama-3.2-1B"), _llama("Llama, 4 layers of 512", **_SMALL)
DEBERTA = _deberta("DeBERTa-v3-base", 12, 128100)
SMALL_DEBERTA = _deberta("DeBERTa-v3-base, 2 layers", 2, 2048)


class Trainee:
    """A model in training, with what its documentation tells a training loop to do.

    `loss` has the regulariser if the model adds it there, `plain_loss` has not. `allocator` is
    ours, attached to the optimizer; `allocate` is called after the optimizer's step.
    """

    def __init__(
        self, model: Any, loss: Any = None, plain: Any = None, allocate: Any = None
    ) -> None:
        self.model, self.loss = model, loss or _loss_of(model)
        self.plain_loss, self.allocate, self.allocator = plain or self.loss, allocate, None
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
        self.optimizer: Any = None
        self.steps = 0

    def remember(self) -> None:
        """Take the parameters as they are for those that training begins with."""
        self._initial = [p.detach().clone() for p in self.trained]

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to the parameters that training began with, and no gradients."""
        self.model.zero_grad()
        for parameter, value in zip(self.trained, self._initial, strict=True):
            parameter.copy_(value)

    def optimize(self, **options: bool) -> Trainee:
        """Add the optimizer that all have."""
        options["fused"] = True
        self.optimizer = torch.optim.AdamW(self.trained, lr=_LEARNING_RATE, **options)
        return self

    def step(self, batch: Any, keep_gradients: bool = False) -> Tensor:
        """Take a whole step of training and return the loss.

        With `keep_gradients` they, the regulariser's among them, are left to be looked at.
        """
        self.steps += 1
        loss = self.loss(batch)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        if self.allocate is not None:
            self.allocate(self.steps)
        if not keep_gradients:
            self.model.zero_grad()
        return loss.detach()


class Captured(Trainee):
    """Ours, with the whole step in a CUDA graph of the batch that it was last given."""

    _graph = _batch = None

    def step(self, batch: Any, keep_gradients: bool = False) -> Tensor:
        """Send the budget of the step to the device, and replay the graph with new gradients."""
        if self._batch is not batch:
            self._graph, self._batch = None, batch  # Its memory is free for the next.
            self._capture()
        self._advance()
        self._graph.replay()
        return self._loss

    def _advance(self) -> None:
        self.steps += 1
        self.allocator.advance(self.steps)

    def _capture(self) -> None:
        before = [p.detach().clone() for p in self.trained]
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.model.zero_grad()
                self._advance()
                self._work()
        torch.cuda.current_stream().wait_stream(side)
        self.model.zero_grad()
        self._advance()
        with torch.cuda.graph(graph):
            self._loss = self._work()
        self._graph = graph
        with torch.no_grad():
            torch._foreach_copy_(self.trained, before)

    def _work(self) -> Tensor:
        loss = self.loss(self._batch)
        loss.backward()
        adalora_kernels.orth_reg_grad_(self.allocator.adapters, weight=_ORTH_REG_WEIGHT)
        self.optimizer.step()
        self.allocator.update()
        return loss.detach()


def make_trainees(architecture: Architecture, names: Any, device: Any, dtype: Any) -> Any:
    """Make them by name with equal weights; AdaLoRA's factors are equal, too, and not zero."""
    torch.manual_seed(0)
    with device:
        base = architecture.model(architecture.config).to(dtype)
    trainees = {name: _trainee(architecture, copy.deepcopy(base), name) for name in names}
    generator = torch.Generator(device).manual_seed(1)
    factors = [trainees[name].adapters for name in names if name in (PEFT, *OURS)]
    with torch.no_grad():
        for first, *others in zip(*factors, strict=True):
            first.normal_(std=0.02, generator=generator)
            for other in others:
                other.copy_(first)
    for trainee in trainees.values():
        trainee.remember()
    return trainees


def _trainee(architecture: Architecture, model: Any, name: str) -> Trainee:
    model.train()
    if name == FROZEN:
        model.requires_grad_(False)
        model.enable_input_require_grads()
        return Trainee(model)
    options: Any = {"task_type": architecture.task_type}
    options |= {"target_modules": list(architecture.target_modules)}
    if name == LORA:
        return Trainee(get_peft_model(model, LoraConfig(**options))).optimize()
    config = AdaLoraConfig(**options, **_SCHEDULE, orth_reg_weight=_ORTH_REG_WEIGHT)
    model = get_peft_model(model, config)
    plain = _loss_of(model.base_model.model)
    if name == PEFT:
        allocate = model.base_model.update_and_allocate
        return Trainee(model, _loss_of(model), plain, allocate).optimize()
    allocator: Any = adalora_kernels.peft.apply(model).allocator
    if name == CAPTURED:
        made: Trainee = Captured(model, plain, plain).optimize(capturable=True)
    else:
        compiled = torch.compile(model, dynamic=False) if name == COMPILED else model
        made = Trainee(model, _loss_of(compiled), plain).optimize()
        allocator.attach(made.optimizer)
    made.allocator = allocator
    return made


def _loss_of(model: Any) -> Callable[..., Tensor]:
    return lambda batch: model(**batch).loss


def checkpoint(model: Any) -> None:
    """Recompute the activations of every layer in the backward."""
    # There is no dropout; and the state of the generator can't be read while a graph is captured.
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})


class CheckStep:
    """Holds steps to PEFT's AdaLoRA in float64, which comes first; all are reset.

    The loss of each AdaLoRA without the regulariser, and all gradients of its adapters with it,
    have to be the same function, and the gradients of ours may have at most twice the error of
    PEFT's. The loss of the others must be finite. The batch must not be the one that is timed: a
    step that is captured here has the poisoning of memory in it.
    """

    def __init__(self, trainees: Mapping[str, Trainee], batch: Mapping[str, Tensor]) -> None:
        for trainee in trainees.values():
            trainee.reset()
        self.batch, self.eager = batch, None
        self.dtype = trainees[PEFT].trained[0].dtype
        model: Any = copy.deepcopy(trainees[PEFT].model).double()
        model.zero_grad()
        checkpoint(model)
        exact = Trainee(model, _loss_of(model), _loss_of(model.base_model.model))
        self.exact = self._loss_and_gradients(exact)

    def _loss_and_gradients(self, trainee: Trainee) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            plain = trainee.plain_loss(self.batch)
        loss = trainee.step(self.batch, keep_gradients=True)
        gradients = torch.cat([p.grad.flatten() for p in trainee.adapters])
        return plain if trainee.allocator is None else loss, gradients

    def __call__(self, name: str, trainee: Trainee) -> None:
        """Raise what is wrong with a trainee."""
        try:
            if name not in (PEFT, *OURS):
                if not torch.isfinite(trainee.step(self.batch)):
                    raise ArithmeticError("the loss is not finite")
                return
            actual = self._loss_and_gradients(trainee)
            # The same but for the rounding of every layer, in the dtype of the model.
            allowed = 4 * torch.finfo(self.dtype).eps ** 0.5
            for what, one, exact in zip(("loss", "gradients"), actual, self.exact, strict=True):
                error = float((one.double() - exact).norm() / exact.norm())
                if not error <= allowed:
                    raise ArithmeticError(f"{what}: error {error:.2e}, allowed {allowed:.2e}")
            if name in OURS:
                check("gradients", actual[1], self.exact[1], self.eager)
            self.eager = actual[1] if name == PEFT else self.eager
        finally:
            trainee.reset()
