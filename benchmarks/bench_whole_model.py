"""The work on all adapters of a model: importance, allocation, and the regulariser.

Steps are timed as a training loop sees them. On a GPU, where that is bound by the host, what the
device does is a case of its own, in CUDA graphs over inputs beyond the L2. PEFT, loralib and
torch._foreach compute no scores in a step that does not mask; ours do. Every regulariser adds to
gradients that are there already, as those of the loss would be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from adalora_kernels import ops
from benchmarks import adapted_models as models
from benchmarks import whole_models as whole
from benchmarks.adapted_models import DEBERTA_BASE, HOST_ALONE, LLAMA_8B, Architecture
from benchmarks.counting import add_counts, peak_extra_megabytes
from benchmarks.harness import (
    Call,
    Case,
    Context,
    Outcome,
    Rule,
    kind_of,
    sets_beyond_cache,
    time_alone,
)
from benchmarks.whole_models import APPLIED, FOREACH, GRAD_OF_ADAPTERS, LORALIB, PEFT, STEP, UPDATE

MASKING, IMPORTANCE, ORTHOGONALITY = "masking step", "importance only", "orthogonality"
UPDATE_ON_DEVICE = "importance + allocation on the device"
ORTHOGONALITY_ON_DEVICE = "orthogonality on the device"
TRAFFIC, COPY = "memory traffic alone", "copy of as many bytes"
FASTER = "PEFT's time / time"
# An update reads w, g and both averages, and writes both averages.
BYTES_PER_ENTRY = 24
PROVIDERS = {
    MASKING: (PEFT, APPLIED, STEP, LORALIB),
    IMPORTANCE: (PEFT, APPLIED, STEP, FOREACH, LORALIB),
    ORTHOGONALITY: tuple(whole.REGULARISERS),
    UPDATE_ON_DEVICE: (COPY, UPDATE, FOREACH),
    ORTHOGONALITY_ON_DEVICE: (PEFT, GRAD_OF_ADAPTERS),
}
# Design, section 6: on a CPU for DeBERTa-base, on a GPU for Llama-8B.
CPU_GOALS = {MASKING: ">= 10", ORTHOGONALITY: ">= 3"}
GPU_GOALS = {MASKING: ">= 30", ORTHOGONALITY: ">= 30"}
COPY_GOAL, OPS_GOAL, SYNCS_GOAL = "<= 1.3", "<= 40", "<= 0"
# On a CPU the memory is read from a trace, which for more would take longer than all the rest.
_MOST_TRACED = 100
# Of models with more entries w and g alone are 32 MB.
_LARGE = 2**22


def cases(context: Context) -> Sequence[Case]:
    """Whole models, the one with goals first, then curves, of which a masking step says enough."""
    large = (LLAMA_8B, DEBERTA_BASE) if context.for_gpu else (DEBERTA_BASE, LLAMA_8B, HOST_ALONE)
    large, curves = (
        (models.SMOKE[:1], models.SMOKE[1:]) if context.smoke else (large, models.CURVES)
    )
    updated = [one for one in large if context.for_gpu or one is not LLAMA_8B]
    on_device = (UPDATE_ON_DEVICE, ORTHOGONALITY_ON_DEVICE) if context.for_gpu else ()
    return [
        *(_case(work, each, context) for work in on_device for each in large),
        *(_case(MASKING, each, context) for each in (*large, *curves)),
        *(_case(IMPORTANCE, each, context) for each in updated),
        *(_case(ORTHOGONALITY, each, context) for each in (*large, *curves)),
    ]


def _case(work: str, architecture: Architecture, context: Context) -> Case:
    names = PROVIDERS[work]
    if work == ORTHOGONALITY and architecture.curve:
        # The other ways into the same work cost the same again at every point.
        names = (PEFT, APPLIED, GRAD_OF_ADAPTERS, LORALIB)
    if work == MASKING and context.for_gpu:
        names = (*names, whole.CAPTURED)
    ours = [name for name in names if kind_of(name) == "ours"]
    goals = {(name, "host syncs"): SYNCS_GOAL for name in ours}
    goals |= {(name, "dispatched ops"): OPS_GOAL for name in ours if work == MASKING}
    if architecture is (LLAMA_8B if context.for_gpu else DEBERTA_BASE):
        limits = GPU_GOALS if context.for_gpu else CPU_GOALS
        goals |= {(name, FASTER): limits[work] for name in ours if work in limits}
        goals |= {(UPDATE, f"time / {COPY}"): COPY_GOAL} if UPDATE in names else {}
    # A floor says nothing where all are bound by the host.
    floor = work in (MASKING, IMPORTANCE) and not context.for_gpu
    names = (*names, TRAFFIC) if floor and architecture is not HOST_ALONE else names
    return Case(work, architecture.settings, names, goals, architecture, architecture.curve)


def measure(case: Case, context: Context) -> Outcome:
    """Check the providers of a case, count what a call asks for, and time all of them."""
    outcome = Outcome(case)
    providers = _right_providers(case, context, outcome)
    if case.work in (UPDATE_ON_DEVICE, ORTHOGONALITY_ON_DEVICE):
        names = [name for name in case.providers if name in providers or name == COPY]
        # Their models need not stay.
        del providers
        if context.timed:
            _time_on_device(case, context, outcome, names)
        return outcome
    calls = {name: [_call(case, one)] for name, one in providers.items() if name in case.providers}
    for name, (call,) in calls.items():
        _count(outcome, name, call, context.device)
    if TRAFFIC in case.providers:
        calls[TRAFFIC] = [_traffic(case.of.entries)]
    seconds, rounds = (0.4, (3, 30)) if case.curve else (1.5, (4, 60))
    samples = outcome.time(context, calls, seconds=seconds, rounds=rounds, by_host=True)
    if samples is not None:
        outcome.compare(samples, PEFT, FASTER)
        outcome.compare(samples, TRAFFIC, f"speed / {TRAFFIC}")
    return outcome


def _call(case: Case, provider: whole.Provider) -> Call:
    if case.work in (MASKING, IMPORTANCE):
        return partial(provider.call, models.MASKS if case.work == MASKING else models.UPDATES)
    return provider.call


def _makers(case: Case) -> Mapping[str, Callable[[Any], whole.Provider]]:
    """What puts the providers on a model; PEFT's, which the others are held to, comes first."""
    make = whole.REGULARISERS if case.work.startswith(ORTHOGONALITY) else whole.STEPS
    return {name: make[name] for name in make if name == PEFT or name in case.providers}


def _right_providers(case: Case, context: Context, outcome: Outcome) -> dict[str, whole.Provider]:
    """Make the providers, and drop those that fail or are wrong.

    Each has a model of its own, for a cache might keep the tensors of one for the next. A large one
    takes seconds to make, and no cache keeps it, so it is shared by all that leave its modules
    alone, which `apply` does not. The check of their results puts back what they write.
    """
    new = partial(models.adapted_model, case.of, context.device)
    first, regularises = new(), case.work.startswith(ORTHOGONALITY)
    rule = Rule((whole.exact_regulariser if regularises else whole.exact_step)(first))
    missing, providers = "" if regularises else missing_kernels(context.device), {}
    for name, make in _makers(case).items():
        shared = name == PEFT or (case.of.entries > _LARGE and name != APPLIED)
        try:
            if missing and kind_of(name) == "ours":
                raise RuntimeError(missing)
            providers[name] = make(first if shared else new())
        # A graph that can't be captured, say.
        except Exception as error:
            outcome.fail(name, error)
    outcome.keep_right(providers, lambda name, one: rule(name, one.results()))
    return providers


def missing_kernels(device: torch.device) -> str:
    """Say why the importance update is plain PyTorch on a GPU; empty where it is not."""
    update = [op for op in ops.implementations(device.type) if op.op == "importance_update_"]
    why = "".join(op.why_not_faster for op in update if device.type == "cuda")
    return why and f"importance_update_ is plain PyTorch: {why}"


def _traffic(entries: int) -> Call:
    """What no update can avoid: read w, g and both averages, and write both averages."""
    w, g, ipt, unc = torch.ones(4, entries).unbind()
    return lambda: (torch.dot(w, g), ipt.mul_(1.0), unc.mul_(1.0))


def _count(outcome: Outcome, name: str, call: Call, device: torch.device) -> None:
    add_counts(outcome, name, call, device)
    if device.type == "cuda" or outcome.case.settings["matrices"] <= _MOST_TRACED:
        outcome.add(name, "peak extra MB", peak_extra_megabytes(call, device))


def _time_on_device(case: Case, context: Context, outcome: Outcome, names: Sequence[str]) -> None:
    """Time CUDA graphs over inputs beyond the L2, as multiples of a copy's time or of PEFT's."""
    # Of every set at least w and g are read.
    sets = sets_beyond_cache(8 * case.of.entries, context.device)
    calls = {n: [_on_device(case, n, context.device) for _ in range(sets)] for n in names}
    samples = outcome.time(context, calls, seconds=1.5)
    if samples is not None:
        to = case.providers[0]
        outcome.compare(samples, to, FASTER if to == PEFT else f"time / {to}")


def _on_device(case: Case, name: str, device: torch.device) -> Call:
    """Make a call on inputs of its own."""
    if name == COPY:
        half = BYTES_PER_ENTRY // 8 * case.of.entries
        source, target = torch.ones(2, half, device=device).unbind()
        return partial(target.copy_, source)
    model = models.adapted_model(case.of, device)
    if name == UPDATE:
        allocator = whole.allocator_of(model)
        allocator.advance(models.MASKS)
        return allocator.update
    call = _makers(case)[name](model).call
    return partial(call, models.UPDATES) if name == FOREACH else call


def guarded() -> list[Case]:
    """The cases whose counts the guard compares, on a CPU."""
    context = Context(torch.device("cpu"))
    return [_case(work, DEBERTA_BASE, context) for work in (MASKING, IMPORTANCE, ORTHOGONALITY)]


bench_whole_model = time_alone
