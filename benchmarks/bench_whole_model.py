"""The work on all adapters of a model: importance, allocation, and the regulariser.

Steps are timed as a training loop sees them. On a GPU, where that is bound by the host, what the
device does is a case of its own, in CUDA graphs over inputs beyond the L2. PEFT and torch._foreach
compute no scores in a step that does not mask; ours do. Every regulariser adds to gradients that
are there already, as those of the loss would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from adalora_kernels import ops
from benchmarks import harness
from benchmarks import whole_models as whole
from benchmarks.counting import add_counts, peak_extra_megabytes
from benchmarks.harness import Call, Case, Context, Outcome, check, kind_of
from benchmarks.whole_models import APPLIED, DEBERTA_BASE, FOREACH, LLAMA_8B, PEFT, STEP

MASKING, IMPORTANCE, ORTHOGONALITY = "masking step", "importance only", "orthogonality"
UPDATE_ON_DEVICE = "importance + allocation on the device"
TRAFFIC, COPY = "memory traffic alone", "copy of as many bytes"
FASTER = "PEFT's time / time"
# An update reads w, g and both averages, and writes both averages.
BYTES_PER_ENTRY = 24
PROVIDERS = {
    MASKING: (PEFT, APPLIED, STEP),
    IMPORTANCE: (PEFT, APPLIED, STEP, FOREACH),
    ORTHOGONALITY: tuple(whole.REGULARISERS),
    UPDATE_ON_DEVICE: (COPY, whole.UPDATE),
}
# Design, section 6: on a CPU for DeBERTa-base, on a GPU for Llama-8B.
CPU_GOALS = {MASKING: ">= 10", ORTHOGONALITY: ">= 3"}
GPU_GOALS = {MASKING: ">= 30", ORTHOGONALITY: ">= 30"}
COPY_GOAL, OPS_GOAL, SYNCS_GOAL, HOST_GOAL = "<= 1.3", "<= 40", "<= 0", ">= 25"
# On a CPU the memory is read from a trace, which for more would take longer than all the rest.
_MOST_TRACED = 100
# Of models with more entries w and g alone are 32 MB.
_LARGE = 2**22


def cases(context: Context) -> Sequence[Case]:
    """Whole models, the one with goals first, then curves, of which a masking step says enough."""
    large, curves = (DEBERTA_BASE, LLAMA_8B, whole.HOST_ALONE), whole.CURVES
    if context.for_gpu:
        large = (LLAMA_8B, DEBERTA_BASE)
    if context.smoke:
        large, curves = whole.SMOKE[:1], whole.SMOKE[1:]
    works = [UPDATE_ON_DEVICE] if context.for_gpu else []
    found = [
        (work, each) for each in large for work in (*works, MASKING, ORTHOGONALITY, IMPORTANCE)
    ]
    # On a CPU the importance of the largest would take long, and its masking step says enough.
    left_out = () if context.for_gpu else ((IMPORTANCE, LLAMA_8B),)
    found += [(work, each) for work in (MASKING, ORTHOGONALITY) for each in curves]
    return [_case(*one, context) for one in found if one not in left_out]


def _case(work: str, architecture: whole.Architecture, context: Context) -> Case:
    names = PROVIDERS[work]
    ours = [name for name in names if kind_of(name) == "ours"]
    goals = {(name, "host syncs"): SYNCS_GOAL for name in ours}
    goals |= {(name, "dispatched ops"): OPS_GOAL for name in ours if work == MASKING}
    if architecture is (LLAMA_8B if context.for_gpu else DEBERTA_BASE):
        limits = GPU_GOALS if context.for_gpu else CPU_GOALS
        goals |= {(name, FASTER): limits[work] for name in ours if work in limits}
        goals |= {(name, f"time / {COPY}"): COPY_GOAL for name in ours if COPY in names}
    if architecture is whole.HOST_ALONE and work == MASKING:
        goals |= {(name, FASTER): HOST_GOAL for name in ours}
    # A floor says nothing where all are bound by the host.
    if not context.for_gpu and work != ORTHOGONALITY and architecture is not whole.HOST_ALONE:
        names = (*names, TRAFFIC)
    # A guess for a GPU: about twenty calls of PEFT's, which takes half a millisecond per matrix.
    seconds = 2.0 + 0.012 * architecture.settings["matrices"]
    of = (architecture, architecture.curve)
    return Case(work, architecture.settings, names, goals, *of, expected_seconds=seconds)


def measure(case: Case, context: Context) -> Outcome:
    """Check the providers of a case, count what a call asks for, and time all of them."""
    outcome = Outcome(case)
    providers = _right_providers(case, context, outcome)
    if case.work == UPDATE_ON_DEVICE:
        names = [name for name in case.providers if name in providers or name == COPY]
        del providers  # Their models need not stay.
        # Of every set at least w and g are read.
        sets = harness.sets_beyond_cache(8 * case.of.entries, context.device)
        calls = {n: [_on_device(case, n, context.device) for _ in range(sets)] for n in names}
        outcome.time(context, calls, seconds=1.5)
        outcome.compare(COPY, f"time / {COPY}")
        return outcome
    calls = {}
    for name, provider in providers.items():
        if name not in case.providers:
            continue
        call = provider.call
        if case.work != ORTHOGONALITY:
            call = partial(call, whole.MASKS if case.work == MASKING else whole.UPDATES)
        calls[name] = [call]
        add_counts(outcome, name, call, context.device)
        if context.on_gpu or case.settings["matrices"] <= _MOST_TRACED:
            outcome.add(name, "peak extra MB", peak_extra_megabytes(call, context.device))
    if TRAFFIC in case.providers:
        # What no update can avoid: read w, g and both averages, and write both averages.
        w, g, ipt, unc = torch.ones(4, case.of.entries).unbind()
        calls[TRAFFIC] = [lambda: (torch.dot(w, g), ipt.mul_(1.0), unc.mul_(1.0))]
    seconds, rounds = (0.4, (3, 30)) if case.curve else (1.5, (4, 60))
    outcome.time(context, calls, seconds=seconds, rounds=rounds, clock=harness.WALL)
    outcome.compare(PEFT, FASTER)
    outcome.compare(TRAFFIC, f"speed / {TRAFFIC}")
    return outcome


def _right_providers(case: Case, context: Context, outcome: Outcome) -> dict[str, whole.Provider]:
    """Make the providers, and drop those that fail or are wrong.

    Each has a model of its own, for a cache might keep the tensors of one for the next. A large one
    takes seconds to make, and no cache keeps it, so it is shared by all that leave its modules
    alone, which `apply` does not. The check of their results puts back what they write.
    """
    new = partial(whole.adapted_model, case.of, context.device)
    first, regularises = new(), case.work == ORTHOGONALITY
    exact = (whole.exact_regulariser if regularises else whole.exact_step)(first)
    missing, providers = "" if regularises else missing_kernels(context.device), {}
    peft: list[Tensor] = []
    for name, make in (whole.REGULARISERS if regularises else whole.STEPS).items():
        # PEFT's, which the others are held to, comes first.
        if name not in (PEFT, *case.providers):
            continue
        shared = name == PEFT or (case.of.entries > _LARGE and name != APPLIED)
        try:
            if missing and kind_of(name) == "ours":
                raise RuntimeError(missing)
            providers[name] = make(first if shared else new())
        # A graph that can't be captured, say.
        except Exception as error:
            outcome.fail(name, error)

    def check_one(name: str, provider: whole.Provider) -> None:
        before = [tensor.detach().clone() for tensor in provider.written]
        try:
            results = provider.results()
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(provider.written), before)
        for i, (result, right) in enumerate(zip(results, exact, strict=False)):
            # Ours may have twice PEFT's error, whose turn is the first.
            by_rule = peft and kind_of(name) == "ours" and right.is_floating_point()
            check(f"result {i}", result, right, peft[i] if by_rule else None)
        peft.extend(results if name == PEFT else ())

    outcome.keep_right(providers, check_one)
    return providers


def missing_kernels(device: torch.device) -> str:
    """Say why the importance update is plain PyTorch on a GPU; empty where it is not."""
    found = {op.op: op for op in ops.implementations(device)}["importance_update_"]
    why = found.why_not_faster if device.type == "cuda" else ""
    return why and f"importance_update_ is {found.name}: {why}"


def _on_device(case: Case, name: str, device: torch.device) -> Call:
    """Make a call on inputs of its own, for a CUDA graph."""
    if name == COPY:
        half = BYTES_PER_ENTRY // 8 * case.of.entries
        source, target = torch.ones(2, half, device=device).unbind()
        # By a kernel: as a node of a graph a copy takes nearly half as long again (NOTES.md).
        return partial(torch.neg, source, out=target)
    allocator = whole.allocator_of(whole.adapted_model(case.of, device))
    allocator.advance(whole.MASKS)
    return allocator.update


def guarded() -> list[Case]:
    """The cases whose counts the guard compares, on a CPU."""
    context = Context(torch.device("cpu"))
    return [_case(work, DEBERTA_BASE, context) for work in (MASKING, IMPORTANCE, ORTHOGONALITY)]


bench_whole_model = harness.time_alone
