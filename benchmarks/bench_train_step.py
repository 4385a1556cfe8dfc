"""Whole training steps: without an adapter, with LoRA and AdaLoRA in PEFT, and with ours.

Llama-3.2-1B and DeBERTa-v3-base with random weights on a GPU, small ones of both kinds on a CPU.
All start from the same weights and see the same batch. LoRA and AdaLoRA have PEFT's default ranks
(8; 12 to 8), and AdaLoRA masks in every step, PEFT's default, too (deltaT=1).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor

import adalora_kernels
import adalora_kernels.peft
from benchmarks.counting import add_counts, peak_extra_megabytes
from benchmarks.harness import WALL, Case, Context, Outcome, check, time_alone

FROZEN, LORA, PEFT = "no adapter", "LoRA in PEFT", "AdaLoRA in PEFT"
APPLIED, COMPILED = "peft.apply", "peft.apply, torch.compile"
OURS = (APPLIED, COMPILED)
# So long that every step of a bench is one of the budgeting phase.
_SCHEDULE = {"tinit": 0, "tfinal": 10, "deltaT": 1, "total_step": 1_000_000}
_ORTH_REG_WEIGHT, _LEARNING_RATE = 0.5, 1e-4
RATIO, MEMORY_RATIO = f"time / {LORA}", f"peak extra MB / {PEFT}'s"
# Of transformers' models some look at a mask.
OWN_SYNCS = "host syncs, without the model's own"
# Design, section 6, asks the first at Llama-3.2-1B's shapes on a GPU; elsewhere no less is wanted.
GOALS = {RATIO: "<= 1", OWN_SYNCS: "<= 0", MEMORY_RATIO: "< 1"}
# The batch of a check, which a GPU has room for in float64, and a CPU time.
_MOST_TOKENS = {"cuda": 4096, "cpu": 64}


@dataclass(frozen=True, eq=False)
class Architecture:
    """A transformers model with random weights."""

    name: str
    model: Any
    config: Any
    task_type: str
    target_modules: list[str]

    def batch(self, rows: int, tokens: int, device: torch.device) -> Mapping[str, Tensor]:
        """Draw random tokens, to predict them, or one of two classes for each row."""
        generator = torch.Generator(device).manual_seed(0)
        new = partial(torch.randint, generator=generator, device=device)
        ids = new(0, self.config.vocab_size, (rows, tokens))
        labels = ids if self.task_type == "CAUSAL_LM" else new(0, 2, (rows,))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def llama(name: str, **sizes: int) -> Architecture:
    """Describe Llama-3.2-1B, but for the sizes."""
    config = transformers.LlamaConfig(
        **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192}
        | {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"max_position_embeddings": 131072, "tie_word_embeddings": True, "use_cache": False}
        | sizes
    )
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return Architecture(name, transformers.LlamaForCausalLM, config, "CAUSAL_LM", seven)


def _deberta(name: str, layers: int, vocabulary: int) -> Architecture:
    """Describe DeBERTa-v3-base, but for the sizes, and without dropout, which would hide errors."""
    config = transformers.DebertaV2Config(
        **{"vocab_size": vocabulary, "hidden_size": 768, "intermediate_size": 3072}
        | {"num_hidden_layers": layers, "num_attention_heads": 12, "type_vocab_size": 0}
        | {"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm"}
        | {"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
        | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    )
    # The six that the paper adapts: "output.dense" ends two names.
    six = ["query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"]
    model = transformers.DebertaV2ForSequenceClassification
    return Architecture(name, model, config, "SEQ_CLS", six)


_SMALL = {"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 2048}
_SMALL |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
LLAMA, SMALL_LLAMA = llama("Llama-3.2-1B"), llama("Llama, 4 layers of 512", **_SMALL)
DEBERTA = _deberta("DeBERTa-v3-base", 12, 128100)
SMALL_DEBERTA = _deberta("DeBERTa-v3-base, 2 layers", 2, 2048)


class Trainee:
    """A model in training, with what its documentation tells a training loop to do.

    `compiled` is called, which may be the model itself. `allocator` is ours; `allocate` is called
    after the optimizer's step.
    """

    def __init__(self, model: Any, compiled: Any, allocate: Any = None) -> None:
        self.model, self.forward, self.allocate = model, compiled, allocate
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
        self.initial: list[Tensor] = []
        self.allocator: Any = None
        self.optimizer: Any = None
        self.steps = 0
        if self.trained:
            self.optimizer = torch.optim.AdamW(self.trained, lr=_LEARNING_RATE, fused=True)

    def reset(self) -> None:
        """Go back to the parameters that training began with, and no gradients."""
        self.model.zero_grad()
        for parameter, value in zip(self.trained, self.initial, strict=True):
            parameter.data.copy_(value)

    def step(self, batch: Any, keep_gradients: bool = False) -> Tensor:
        """Take a whole step of training and return the loss.

        With `keep_gradients` they, the regulariser's among them, are left to be looked at.
        """
        self.steps += 1
        loss = self.forward(**batch).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        if self.allocate is not None:
            self.allocate(self.steps)
        if not keep_gradients:
            self.model.zero_grad()
        return loss.detach()


def make_trainees(architecture: Architecture, names: Any, device: Any, dtype: Any) -> Any:
    """Make them by name with equal weights; AdaLoRA's factors are equal, too, and not zero."""
    torch.manual_seed(0)
    with device:
        base = architecture.model(architecture.config).to(dtype)
    trainees = {name: _trainee(architecture, copy.deepcopy(base), name) for name in names}
    for name, trainee in trainees.items():
        generator = torch.Generator(device).manual_seed(1)
        for factor in trainee.adapters if name in (PEFT, *OURS) else ():
            torch.nn.init.normal_(factor, std=0.02, generator=generator)
        trainee.initial = [p.detach().clone() for p in trainee.trained]
    return trainees


def _trainee(architecture: Architecture, model: Any, name: str) -> Trainee:
    model.train()
    if name == FROZEN:
        model.requires_grad_(False)
        model.enable_input_require_grads()
        return Trainee(model, model)
    options: Any = {"task_type": architecture.task_type}
    options |= {"target_modules": architecture.target_modules}
    if name == LORA:
        model = get_peft_model(model, LoraConfig(**options))
        return Trainee(model, model)
    config = AdaLoraConfig(**options, **_SCHEDULE, orth_reg_weight=_ORTH_REG_WEIGHT)
    model = get_peft_model(model, config)
    if name == PEFT:
        return Trainee(model, model, model.base_model.update_and_allocate)
    allocator = adalora_kernels.peft.apply(model).allocator
    made = Trainee(model, torch.compile(model, dynamic=False) if name == COMPILED else model)
    allocator.attach(made.optimizer)
    made.allocator = allocator
    return made


def checkpoint(model: Any) -> None:
    """Recompute the activations of every layer in the backward; there is no dropout."""
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})


class CheckStep:
    """Holds AdaLoRA's steps to PEFT's model in float64, and ours to twice the error of PEFT's step.

    That is the rule of design.md, section 7, for four results: the logits, the gradients of the
    loss, how much of each exact one is in the one found, and the gradients with the regulariser's.
    The third sees what is off in proportion, such as the scaling: rounding, however coarse, hardly
    changes it, since it goes up and down. Of PEFT's step, which is what ours is measured by, half
    of the digits have to be right; the others compute functions of their own. All are reset.
    """

    def __init__(self, trainees: Mapping[str, Trainee], batch: Mapping[str, Tensor]) -> None:
        for trainee in trainees.values():
            trainee.reset()
        self.batch = batch
        self.eager: list[Tensor] = []
        model: Any = copy.deepcopy(trainees[PEFT].model).double()
        model.zero_grad()
        checkpoint(model)
        self.exact: list[Tensor] = []
        self.exact = self._results(Trainee(model, model))

    def _results(self, trainee: Trainee) -> list[Tensor]:
        # Ours has no regulariser in its loss.
        ours = trainee.allocator is not None
        output = (trainee.forward if ours else trainee.model.base_model.model)(**self.batch)
        logits = output.logits.detach()
        output.loss.backward()
        del output
        gradients = [p.grad.flatten() for p in trainee.adapters]
        found = torch.cat(gradients)
        exact = (self.exact[1] if self.exact else found).split([len(g) for g in gradients])
        shares = [(g.double() @ e) / (e @ e) for g, e in zip(gradients, exact, strict=True)]
        trainee.model.zero_grad()
        trainee.step(self.batch, keep_gradients=True)
        regularised = torch.cat([p.grad.flatten() for p in trainee.adapters])
        return [logits, found, torch.stack(shares).to(found.dtype), regularised]

    def __call__(self, name: str, trainee: Trainee) -> None:
        """Raise what is wrong with a trainee."""
        try:
            if name not in (PEFT, *OURS):
                if not torch.isfinite(trainee.step(self.batch)):
                    raise ArithmeticError("the loss is not finite")
                return
            if name in OURS and not self.eager:
                raise ArithmeticError("there is no right step of PEFT's to measure it by")
            actual = self._results(trainee)
            half_of_the_digits = torch.finfo(actual[0].dtype).eps ** 0.5
            whats = ("logits", "gradients", "shares of the gradients", "regularised gradients")
            for i, (what, one, exact) in enumerate(zip(whats, actual, self.exact, strict=True)):
                if name in OURS:
                    check(what, one, exact, self.eager[i])
                elif not (one - exact).norm() <= half_of_the_digits * exact.norm():
                    raise ArithmeticError(f"{what}: not half of the digits are right")
            self.eager = actual if name == PEFT else self.eager
        finally:
            trainee.reset()


@dataclass(frozen=True)
class Step:
    """Steps of one model on batches of one size; with `compiled`, ours compiled, too."""

    model: Architecture
    rows: int
    tokens: int
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    compiled: bool = False

    @property
    def case(self) -> Case:
        settings = {"model": self.model.name, "micro-batch": self.rows, "sequence": self.tokens}
        dtype = str(self.dtype).removeprefix("torch.")
        settings |= {"checkpointing": self.checkpointing, "dtype": dtype}
        settings |= {"ranks": {"LoRA": "8", "AdaLoRA": "12 to 8"}}
        settings |= {"with torch.compile": True} if self.compiled else {}
        goals = {(name, measure): goal for name in OURS for measure, goal in GOALS.items()}
        # A guess for a GPU: to make the models, and to compile one.
        seconds = 120.0 if self.compiled else 20.0 if self.model is LLAMA else 12.0
        names = (LORA, FROZEN, PEFT, APPLIED, *([COMPILED] if self.compiled else []))
        return Case("training step", settings, names, goals, self, expected_seconds=seconds)


def cases(context: Context) -> Sequence[Case]:
    """On a GPU those with a goal first, then fewer and more tokens."""
    steps = [Step(SMALL_LLAMA, 1, 64, compiled=True), Step(SMALL_LLAMA, 4, 64)]
    steps += [Step(SMALL_LLAMA, 4, 64, checkpointing=True), Step(SMALL_DEBERTA, 4, 64)]
    if context.smoke:
        steps = [Step(SMALL_LLAMA, 1, 16), Step(SMALL_DEBERTA, 2, 16, checkpointing=True)]
    elif context.for_gpu:
        large = partial(Step, dtype=torch.bfloat16)
        goals = [large(LLAMA, 4, 1024), large(DEBERTA, 16, 512)]
        steps = [*goals, *(replace(step, compiled=True) for step in goals)]
        steps += [replace(step, rows=rows) for rows in (1, 2, 8) for step in goals]
        steps += [replace(step, rows=16, checkpointing=True) for step in goals]
    return [step.case for step in steps]


# Making them takes longer than a step; one model's at a time has room.
_trainees = lru_cache(maxsize=1)(make_trainees)


def measure(case: Case, context: Context) -> Outcome:
    """Check gradients first, then measure time and memory."""
    device, outcome, step = context.device, Outcome(case), case.of
    made = _trainees(step.model, case.providers, device, step.dtype)
    # What the others are compared with comes first.
    trainees = {FROZEN: made[FROZEN], PEFT: made[PEFT], **made}
    for trainee in trainees.values():
        trainee.model.gradient_checkpointing_disable()
        if step.checkpointing:
            checkpoint(trainee.model)
    fewer = max(1, min(step.rows, _MOST_TOKENS[device.type] // step.tokens))
    check_one = CheckStep(trainees, step.model.batch(fewer, step.tokens, device))
    # What is compiled for poisoned memory is compiled for that.
    outcome.keep_right(trainees, check_one, unpoisoned=(COMPILED,))
    batch = step.model.batch(step.rows, step.tokens, device)
    calls = {n: [partial(trainees[n].step, batch)] for n in case.providers if n in trainees}
    outcome.time(context, calls, seconds=2.5, rounds=(4, 40), clock=WALL)
    outcome.compare(LORA, RATIO)
    outcome.compare(FROZEN, f"time / {FROZEN}")
    peaks, syncs = {}, {}
    for name, trainee in trainees.items():
        call = partial(trainee.step, batch)
        peaks[name] = peak_extra_megabytes(call, device)
        outcome.add(name, "peak extra MB", peaks[name])
        if name in OURS and PEFT in peaks:
            outcome.add(name, MEMORY_RATIO, peaks[name] / peaks[PEFT])
        if name != COMPILED:  # Its kernels are called without dispatching anything.
            syncs[name] = add_counts(outcome, name, call, device)
            outcome.add(name, OWN_SYNCS, syncs[name] - syncs.get(FROZEN, 0))
    return outcome


def guarded() -> list[Case]:
    """The cases whose counts the guard compares, on a CPU."""
    return [Step(model, 1, 32).case for model in (SMALL_LLAMA, SMALL_DEBERTA)]


bench_train_step = time_alone
