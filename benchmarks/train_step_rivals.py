"""Who takes whole training steps on a model: without an adapter, LoRA and AdaLoRA in PEFT, ours.

Every rival starts from the same weights and sees the same batch. LoRA and AdaLoRA have PEFT's
default ranks (8; 12 to 8), and AdaLoRA masks in every step, PEFT's default, too (deltaT=1).
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import adalora_kernels
import adalora_kernels.peft
from adalora_kernels import RankAllocator
from benchmarks.numerics import check, poisoned_memory

FROZEN, LORA, PEFT = "no adapter", "LoRA in PEFT", "AdaLoRA in PEFT"
APPLIED, COMPILED, CAPTURED = "peft.apply", "peft.apply, torch.compile", "peft.apply, CUDA graph"
OURS = (APPLIED, COMPILED, CAPTURED)
ADALORA = (PEFT, *OURS)
# What a profiler can tell apart.
LINEAR, REGULARISER = "linear layers", "regulariser"
OPTIMIZER, ALLOCATION = "optimizer", "allocation"

# So long that every step of a bench is one of the budgeting phase.
SCHEDULE = {"tinit": 0, "tfinal": 10, "deltaT": 1, "total_step": 1_000_000}
ORTH_REG_WEIGHT = 0.5
LEARNING_RATE = 1e-4

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A transformers model with random weights."""

    name: str
    make: Callable[[], nn.Module]
    vocabulary: int
    task_type: str
    target_modules: tuple[str, ...]
    # No batch is longer.
    longest: int

    def batch(self, rows: int, tokens: int, device: torch.device) -> Batch:
        """Random tokens; to predict them, or one of two classes for each row."""
        generator = torch.Generator(device).manual_seed(0)
        new = partial(torch.randint, generator=generator, device=device)
        ids = new(0, self.vocabulary, (rows, tokens))
        labels = ids if self.task_type == "CAUSAL_LM" else new(0, 2, (rows,))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _llama(**sizes: int) -> nn.Module:
    """Llama-3.2-1B's config, but for the sizes."""
    config = {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **sizes}))


def _deberta(**sizes: int) -> nn.Module:
    """DeBERTa-v3-base's config, but for the sizes, and without its own dropout.

    That would be the same work for every rival, and would hide a wrong gradient.
    """
    config = {
        "vocab_size": 128100,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return DebertaV2ForSequenceClassification(DebertaV2Config(**{**config, **sizes}))


_LLAMA_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The six that the paper adapts: "output.dense" ends two names.
_DEBERTA_MATRICES = ("query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense")
LLAMA = Architecture("Llama-3.2-1B", _llama, 128256, "CAUSAL_LM", _LLAMA_MATRICES, 4096)
DEBERTA = Architecture("DeBERTa-v3-base", _deberta, 128100, "SEQ_CLS", _DEBERTA_MATRICES, 512)
SMALL_LLAMA = Architecture(
    "Llama, 4 layers of 512",
    partial(
        _llama,
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    ),
    2048,
    "CAUSAL_LM",
    _LLAMA_MATRICES,
    4096,
)
SMALL_DEBERTA = Architecture(
    "DeBERTa-v3-base, 2 layers",
    partial(_deberta, vocab_size=2048, num_hidden_layers=2),
    2048,
    "SEQ_CLS",
    _DEBERTA_MATRICES,
    512,
)


@dataclass
class Trainee:
    """A model in training, with what its documentation tells a training loop to do.

    Attributes:
        loss: of a batch, with the regulariser if it is in the loss.
        plain_loss: the same without it.
        optimizer: None where nothing is trained.
        allocate: to be called after the optimizer's step, with the step's number.
        regularise: adds the regulariser's gradients, and does nothing else; not part of `step`.
        allocator: ours, attached to the optimizer.
    """

    model: nn.Module
    loss: Callable[[Batch], Tensor]
    plain_loss: Callable[[Batch], Tensor]
    optimizer: torch.optim.Optimizer | None = None
    allocate: Callable[[int], object] | None = None
    regularise: Callable[[], object] | None = None
    allocator: RankAllocator | None = None
    steps: int = field(default=0, init=False)
    _initial: list[Tensor] = field(default_factory=list, init=False)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What an optimizer has to move."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def remember(self) -> None:
        """Take the parameters as they are for those that training begins with."""
        self._initial = [p.detach().clone() for p in self.trained]

    @torch.no_grad()
    def reset(self) -> None:
        """The parameters that training began with, and no gradients."""
        self.model.zero_grad()
        for parameter, value in zip(self.trained, self._initial, strict=True):
            parameter.copy_(value)

    def step(self, batch: Batch) -> Tensor:
        """A whole step of training; the loss."""
        loss = self.step_with_gradients(batch)
        self.model.zero_grad()
        return loss

    def step_with_gradients(self, batch: Batch) -> Tensor:
        """The same, but the gradients, the regulariser's among them, stay to be looked at."""
        self.steps += 1
        loss = self.loss(batch)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        if self.allocate is not None:
            self.allocate(self.steps)
        return loss.detach()

    def step_in_parts(self, batch: Batch) -> None:
        """A step whose parts a profiler can tell apart: regulariser and allocator by hand."""
        self.steps += 1
        self.plain_loss(batch).backward()
        if self.regularise is not None:
            self.regularise()
        if self.optimizer is not None:
            with record_function(OPTIMIZER):
                self.optimizer.step()
        allocate = self.allocator.step if self.allocator is not None else self.allocate
        if allocate is not None:
            with record_function(ALLOCATION):
                allocate(self.steps)
        self.model.zero_grad()

    @contextlib.contextmanager
    def by_hand(self) -> Iterator[None]:
        """Within it our allocator is not attached, and its steps are for `step_in_parts`."""
        attached = self.allocator is not None and self.allocator.attached
        if attached:
            self.allocator.detach()
        try:
            yield
        finally:
            if attached:
                self.allocator.attach(self.optimizer)

    def gradients(self) -> Tensor:
        """Of all lora_A, lora_E and lora_B, as one vector."""
        return torch.cat([_grad(p).flatten() for p in _adapters(self.model)])


def make_trainees(
    architecture: Architecture, names: Sequence[str], device: torch.device, dtype: torch.dtype
) -> dict[str, Trainee]:
    """The rivals by name, with equal weights; AdaLoRA's factors are equal, too, and not zero."""
    torch.manual_seed(0)
    with device:
        base = architecture.make().to(dtype)
    trainees = {name: _trainee(architecture, copy.deepcopy(base), name) for name in names}
    generator = torch.Generator(device).manual_seed(1)
    factors = [_adapters(trainees[name].model) for name in names if name in ADALORA]
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
        loss = partial(_loss, model)
        return Trainee(model, loss, loss)
    options: dict[str, Any] = {
        "task_type": architecture.task_type,
        "target_modules": list(architecture.target_modules),
    }
    if name == LORA:
        model = get_peft_model(model, LoraConfig(**options))
        loss = partial(_loss, model)
        return Trainee(model, loss, loss, _optimizer(model))
    options |= {**SCHEDULE, "orth_reg_weight": ORTH_REG_WEIGHT}
    model = get_peft_model(model, AdaLoraConfig(**options))
    inner = partial(_loss, model.base_model.model)
    if name == PEFT:
        allocate = model.base_model.update_and_allocate
        alone = partial(_peft_regulariser, model.base_model)
        return Trainee(model, partial(_loss, model), inner, _optimizer(model), allocate, alone)
    allocator = adalora_kernels.peft.apply(model).allocator
    if allocator is None:
        raise TypeError("apply() found nothing to train")
    regularise = partial(adalora_kernels.orth_reg_grad_, allocator.adapters, weight=ORTH_REG_WEIGHT)
    if name == CAPTURED:
        optimizer = _optimizer(model, capturable=True)
        return Captured(model, inner, inner, optimizer, None, regularise, allocator)
    optimizer = _optimizer(model)
    allocator.attach(optimizer)
    forward = torch.compile(model, dynamic=False) if name == COMPILED else model
    return Trainee(model, partial(_loss, forward), inner, optimizer, None, regularise, allocator)


def _peft_regulariser(tuner: AdaLoraModel) -> None:
    """The real `AdaLoraModel.forward`, around a model that for once has a loss of 0."""
    device = next(tuner.parameters()).device
    tuner.model.forward = lambda: SimpleNamespace(loss=torch.zeros((), device=device))
    try:
        tuner().loss.backward()
    finally:
        del tuner.model.forward


@dataclass(frozen=True)
class _Graph:
    replay: Callable[[], None]
    batch: Batch
    loss: Tensor


@dataclass
class Captured(Trainee):
    """Ours, with the whole step in a CUDA graph: of the batch that it was last given."""

    _graph: _Graph | None = field(default=None, init=False)

    def step_with_gradients(self, batch: Batch) -> Tensor:
        """The budget of the step goes to the device, and the graph is replayed."""
        if self._graph is None or self._graph.batch is not batch:
            self._graph = None  # Its memory is free for the next.
            self._graph = self._capture(batch)
        self._advance()
        self._graph.replay()
        return self._graph.loss

    def step(self, batch: Batch) -> Tensor:
        """The same: in the graph the gradients begin as new ones."""
        return self.step_with_gradients(batch)

    def _advance(self) -> RankAllocator:
        if self.allocator is None:
            raise TypeError("there is no allocator to capture")
        self.steps += 1
        self.allocator.advance(self.steps)
        return self.allocator

    def _capture(self, batch: Batch) -> _Graph:
        before = [p.detach().clone() for p in self.trained]
        self.model.zero_grad()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._work(batch, self._advance())
                self.model.zero_grad()
        torch.cuda.current_stream().wait_stream(side)
        graph, allocator = torch.cuda.CUDAGraph(), self._advance()
        with torch.cuda.graph(graph):
            loss = self._work(batch, allocator)
        with torch.no_grad():
            for parameter, value in zip(self.trained, before, strict=True):
                parameter.copy_(value)
        return _Graph(graph.replay, batch, loss)

    def _work(self, batch: Batch, allocator: RankAllocator) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        if self.regularise is not None:
            self.regularise()
        if self.optimizer is not None:
            self.optimizer.step()
        allocator.update()
        return loss.detach()


def _optimizer(model: nn.Module, **options: bool) -> torch.optim.Optimizer:
    """The same for all."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True, **options)


def _loss(model: Callable[..., Any], batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def _adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".lora_" in name]


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError("an adapter parameter without a gradient")
    return parameter.grad


def set_checkpointing(trainees: Mapping[str, Trainee], on: bool) -> None:
    """Recompute the activations of every layer in the backward, or keep them."""
    for trainee in trainees.values():
        if on:
            _checkpoint(trainee.model)
        else:
            trainee.model.gradient_checkpointing_disable()


def _checkpoint(model: nn.Module) -> None:
    # There is no dropout; and the state of the generator can't be read while a graph is captured.
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})


def wrong_steps(trainees: Mapping[str, Trainee], batch: Batch) -> dict[str, Exception]:
    """Which rivals take a wrong step, or none, PEFT's AdaLoRA first.

    Of each AdaLoRA the loss without the regulariser, and all gradients of the adapters with it, are
    held against PEFT's in float64. Both have to be the same function, and the gradients of ours may
    have at most twice the error of PEFT's; of the loss, one number, that would be a matter of luck.
    Of the others the loss must be finite. All are reset. The batch must not be the one that is
    timed: a step that is captured here has the poisoning of memory in it.
    """
    for trainee in trainees.values():
        trainee.reset()
    dtype = next(trainees[PEFT].model.parameters()).dtype
    exact = _loss_and_gradients(_in_double(trainees[PEFT]), batch)
    eager: list[Tensor] = []
    wrong: dict[str, Exception] = {}
    for name in sorted(trainees, key=lambda name: name != PEFT):
        trainee = trainees[name]
        try:
            if name in ADALORA:
                # Not the compiled one: what is compiled for poisoned memory is compiled for that.
                poisoned = name in OURS and name != COMPILED
                with poisoned_memory() if poisoned else contextlib.nullcontext():
                    actual = _loss_and_gradients(trainee, batch)
                _check_same_function(name, actual, exact, dtype)
                eager = actual if name == PEFT else eager
                if name in OURS:
                    check(f"{name}: gradients", actual[1], exact[1], eager[1])
            elif not torch.isfinite(trainee.step(batch)):
                raise ArithmeticError(f"{name}: the loss is not finite")
        # Anything can go wrong in a step, and what did must not be timed.
        except Exception as error:
            wrong[name] = error
        trainee.reset()
    return wrong


def _in_double(trainee: Trainee) -> Trainee:
    """PEFT's in float64, not to be trained further: without an optimizer and an allocator."""
    model = copy.deepcopy(trainee.model).double()
    model.zero_grad()
    _checkpoint(model)
    inner = partial(_loss, model.base_model.model)
    return Trainee(model, partial(_loss, model), inner)


def _loss_and_gradients(trainee: Trainee, batch: Batch) -> list[Tensor]:
    in_loss = trainee.loss is not trainee.plain_loss and trainee.allocator is None
    plain = None
    if in_loss:
        with torch.no_grad():
            plain = trainee.plain_loss(batch)
    loss = trainee.step_with_gradients(batch)
    return [loss if plain is None else plain, trainee.gradients()]


def _check_same_function(
    name: str, actual: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """But for the rounding of every layer, in the dtype of the model."""
    for what, one, right in zip(("loss", "gradients"), actual, exact, strict=True):
        error = float((one.double() - right).norm() / right.norm())
        allowed = 4 * torch.finfo(dtype).eps ** 0.5
        if not error <= allowed:
            raise ArithmeticError(f"{name}: {what}: error {error:.2e}, allowed {allowed:.2e}")


def shares(trainee: Trainee, batch: Batch, device: torch.device) -> dict[str, float]:
    """The parts of a step's time: of the device's busy time on a GPU, else of the CPU's."""
    with trainee.by_hand(), _ranges_of_linear_layers(trainee.model):
        parts, whole = _profiled(partial(trainee.step_in_parts, batch), device)
        if trainee.regularise is not None:
            # Alone, since on a GPU its backward is on another thread than its forward.
            _, parts[REGULARISER] = _profiled(trainee.regularise, device)
            trainee.model.zero_grad()
    return {part: seconds / whole for part, seconds in parts.items()}


def _profiled(call: Callable[[], object], device: torch.device) -> tuple[dict[str, float], float]:
    """The time of each part of a call that has a name, and of the whole."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for calls in (1, 2):  # The first profile of a process starts up.
        with torch.profiler.profile(activities=activities) as trace:
            for _ in range(calls):
                with record_function(_WHOLE):
                    call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    found = {event.key: event for event in trace.key_averages()}
    named = [part for part in (LINEAR, OPTIMIZER, ALLOCATION) if part in found]
    if device.type == "cuda":
        parts = {part: found[part].device_time_total for part in named}
        return parts, sum(event.self_device_time_total for event in found.values())
    return {part: found[part].cpu_time_total for part in named}, found[_WHOLE].cpu_time_total


_WHOLE = "all of it"


@contextlib.contextmanager
def _ranges_of_linear_layers(model: nn.Module) -> Iterator[None]:
    """Tell the profiler when the layers that can have an adapter run, forward and backward."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    # Otherwise the first layer has no gradient of its input, at which its backward would end.
    inner.enable_input_require_grads()
    handles, open_ranges = [], []

    def begin(*_: Any) -> None:
        open_ranges.append(record_function(LINEAR))
        open_ranges[-1].__enter__()

    def end(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    for layer in _linear_layers(inner):
        handles += [
            layer.register_forward_pre_hook(begin),
            layer.register_forward_hook(end),
            layer.register_full_backward_pre_hook(begin),
            layer.register_full_backward_hook(end),
        ]
    try:
        with warnings.catch_warnings():
            # Of layers whose input has no gradient: DeBERTa's positions, frozen.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            yield
    finally:
        for handle in handles:
            handle.remove()
        inner.disable_input_require_grads()


def _linear_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost linear layers: PEFT's with what is inside them, and those that are plain."""
    for child in module.children():
        if isinstance(child, nn.Linear | BaseTunerLayer):
            yield child
        else:
            yield from _linear_layers(child)
