"""Draws the figures of docs/ from the code that they are about, as SVG for light and dark pages.

    python docs/hooks/figures.py     # writes docs/figures/

Launches and their bytes are those that the package itself would launch for a layer of the size
below; they are recorded and not launched, so no GPU is needed. The budget is that of a
`BudgetSchedule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from adalora_kernels import BudgetSchedule
from adalora_kernels.kernels.launch import Launch, dry_run
from adalora_kernels.kernels.svd_linear import plans, svd_linear_bwd, svd_linear_fwd

FOLDER = Path(__file__).resolve().parents[1] / "figures"
# The site has the drawing within its page, and sets the colours of its own scheme (site.css).
STYLE = """\
.drawing{--ink:#1f2328;--soft:#59636e;--line:#c8ccd1;--a:#0072b2;--b:#d55e00;--c:#009e73}
@media(prefers-color-scheme:dark){.drawing{--ink:#e6edf3;--soft:#9aa4ae;--line:#444c56;--a:#56b4e9;\
--b:#e69f00;--c:#2fbf93}}
.drawing text{font:13px system-ui,sans-serif;fill:var(--ink)}.drawing .soft{fill:var(--soft)}
.drawing .bold{font-weight:600}.drawing .a{fill:var(--a)}.drawing .b{fill:var(--b)}
.drawing .c{fill:var(--c)}.drawing .pale{fill-opacity:.22}
.drawing .line{stroke:var(--line);fill:none}.drawing .ink{stroke:var(--ink);fill:none}
.drawing .curve{stroke:var(--a);stroke-width:2.5;fill:none}
"""
# M rows, K and N features, rank r; bfloat16 with float32 adapters on a GPU like the H200.
M, K, N, R = 8192, 4096, 4096, 16
H200 = plans.Device("NVIDIA H200", "sm_90", 132)
# What each launch makes of what.
FORWARD = {
    "down": "x, lora_A → parts of h",
    "gemm": "x, W, parts of h, lora_E, lora_B → y and h",
    "split": "lora_A → its parts in bfloat16, cleared flags",
    "gemm, fused": "x, W, parts of lora_A, lora_E, lora_B → y and h",
    "low_rank_add": "parts of h, lora_E, lora_B → y's low-rank term, h",
    "cublas": "x, W → y, added to what is there",
}
BACKWARD = {
    "g_pass": "g, lora_B, h → parts of u and of dlora_B",
    "g_reduce": "these parts, h → u ⊙ e, dlora_B, parts of dlora_E",
    "x_pass": "x, u ⊙ e, parts of dlora_E → dlora_A, dlora_E",
    "x_pass, cublas": "the same, and lora_A → the same, and dx's term",
    "gemm": "g, W, u ⊙ e, lora_A → dx",
    "cublas": "g, W → dx, added to what is there",
}


class Drawing:
    """An SVG that grows by elements; x and y in its own units, of which there are 760 across."""

    def __init__(self, height: float) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height:g}" '
            f'class="drawing" role="img"><style>{STYLE}</style>'
        ]

    def text(self, x: float, y: float, words: str, kind: str = "", at: str = "start") -> None:
        """Write words that start, end or have their middle at x."""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{at}">{escape(words)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """Draw a rectangle."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'class="{kind}"/>'
        )

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """Draw a line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<polyline points="{path}" class="{kind}"/>')

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>\n"])


def launches(direction: str, path: str) -> list[Launch]:
    """What a forward or a backward would launch."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    A, E, B = (meta(*shape, dtype=torch.float32) for shape in ((R, K), (R, 1), (N, R)))
    x, weight, h = meta(M, K), meta(N, K), meta(M, R, dtype=torch.float32)
    rest = (1.0, 0.0, None)  # the scaling, no dropout, no seed
    with dry_run() as recorded:
        if direction == "forward":
            svd_linear_fwd(x, weight, None, A, E, B, None, *rest, path, H200)
        else:
            svd_linear_bwd(meta(M, N), x, weight, A, E, B, None, h, *rest, True, path, H200)
    return recorded


def draw_launches(direction: str, paths: Sequence[str], words: dict[str, str]) -> Drawing:
    """A line for each launch of each path, with bars for the bytes that it reads and writes."""
    found = {path: launches(direction, path) for path in paths}
    lines, left = sum(map(len, found.values())), 490
    most = max(
        size for steps in found.values() for step in steps for size in (step.read, step.written)
    )
    scale = most / 200
    drawing = Drawing(44 + 34 * len(paths) + 42 * lines)
    drawing.box(left, 8, 10, 10, "a")
    drawing.text(left + 16, 18, "reads", "soft")
    drawing.box(left + 80, 8, 10, 10, "b")
    drawing.text(left + 96, 18, "writes", "soft")
    y = 34
    for path, steps in found.items():
        drawing.line([(0, y), (760, y)], "line")
        drawing.text(0, y + 22, path, "bold")
        drawing.text(130, y + 22, f"{len(steps)} launches", "soft")
        y += 34
        for number, step in enumerate(steps, 1):
            drawing.text(0, y + 20, f"{number}", "soft")
            drawing.text(20, y + 20, step.kernel)
            what = words.get(f"{step.kernel}, {path}", words[step.kernel])
            drawing.text(130, y + 20, what, "soft")
            for row, (size, kind) in enumerate(((step.read, "a"), (step.written, "b"))):
                drawing.box(left, y + 4 + 15 * row, max(size / scale, 1), 11, kind)
                drawing.text(left + size / scale + 6, y + 14 + 15 * row, _mib(size), "soft")
            y += 42
    return drawing


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def draw_gemm() -> Drawing:
    """The one GEMM of a forward: the low-rank term is the last step of its inner loop."""
    drawing = Drawing(330)
    top, left, rows, inner, extra = 96, 110, 130, 250, 26
    drawing.text(left, 20, "K features, a few in each step of the loop", "soft")
    for x in range(0, inner, 50):
        drawing.line([(left + x + 3, 34), (left + x + 47, 34)], "ink")
    drawing.line([(left + inner + 8, 34), (left + inner + 8 + extra, 34)], "ink")
    drawing.text(left + inner + extra + 18, 38, "the last step: r triplets", "soft")
    drawing.text(left - 12, top + rows / 2 + 4, "M rows", "soft", "end")
    drawing.box(left, top, inner, rows, "a pale")
    drawing.box(left + inner + 8, top, extra, rows, "b pale")
    drawing.text(left + inner / 2, top + rows / 2 + 4, "x", "bold", "middle")
    drawing.text(left + inner + 8 + extra / 2, top - 10, "h ⊙ e", "bold", "middle")
    x = left + inner + extra + 100
    drawing.text(x - 42, top + rows / 2 + 6, "·", "bold", "middle")
    drawing.box(x, top, 110, rows, "a pale")
    drawing.box(x, top + rows + 8, 110, extra, "b pale")
    drawing.text(x + 55, top + rows / 2 + 4, "Wᵀ", "bold", "middle")
    drawing.text(x + 55, top + rows + 26, "lora_Bᵀ", "bold", "middle")
    drawing.text(x + 128, top + rows / 2 + 4, "=", "bold")
    drawing.box(x + 152, top, 100, rows, "c pale")
    drawing.text(x + 202, top + rows / 2 + 4, "y", "bold", "middle")
    drawing.text(x + 55, top - 10, "N features", "soft", "middle")
    explained = (
        "The first launch has made h = x·lora_Aᵀ; e = scaling · lora_E.",
        "The same kernel makes dx: g for x, W along its other side, lora_A for lora_B, "
        "u ⊙ e for h ⊙ e.",
    )
    for line, words in enumerate(explained):
        drawing.text(left, top + rows + 62 + 20 * line, words, "soft")
    return drawing


def draw_budget() -> Drawing:
    """The budget over the steps, in the proportions of docs/recipe.md."""
    matrices, first, last, total, tinit, tfinal = 72, 12, 8, 1000, 100, 400
    schedule = BudgetSchedule(matrices * first, matrices * last, tinit, tfinal, 1, total)
    left, right, top, bottom = 150, 750, 50, 230
    drawing = Drawing(280)

    def x(step: float) -> float:
        return left + (right - left) * step / total

    def y(budget: float) -> float:
        return bottom - (bottom - top) * (budget / matrices - last + 1) / (first - last + 1.5)

    ends = [0, tinit, schedule.final_step, total]
    for name, begin, end, kind in zip(
        ("initial", "budgeting", "final"), ends, ends[1:], "bac", strict=False
    ):
        drawing.box(x(begin), top, x(end) - x(begin), bottom - top, f"{kind} pale")
        drawing.text(x((begin + end) / 2), top - 12, name, "bold", "middle")
    drawing.line([(left, top), (left, bottom), (right, bottom)], "ink")
    drawing.line([(x(s), y(schedule.budget(s))) for s in range(0, total + 1, 10)], "curve")
    for budget, words in ((first, "init_r"), (last, "target_r")):
        drawing.text(left - 10, y(matrices * budget) + 4, f"{words} per matrix", "soft", "end")
    for step, words in zip(ends[1:], ("tinit", "total_step - tfinal", "total_step"), strict=True):
        drawing.text(x(step), bottom + 20, words, "soft", "end" if step == total else "middle")
    drawing.text(x(390), y(matrices * 11), "a pruned triplet may come back", "soft", "middle")
    drawing.text(x(800), y(matrices * 9.2), "the pattern is fixed", "soft", "middle")
    drawing.text(x(500), bottom + 42, "optimizer steps", "soft", "middle")
    return drawing


def drawings() -> dict[str, str]:
    """Every figure, by the name of its file."""
    found = {
        "budget.svg": draw_budget(),
        "gemm.svg": draw_gemm(),
        "forward.svg": draw_launches("forward", ("two_pass", "fused", "cublas"), FORWARD),
        "backward.svg": draw_launches("backward", ("two_pass", "cublas"), BACKWARD),
    }
    return {name: str(drawing) for name, drawing in found.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, svg in drawings().items():
        (FOLDER / name).write_text(svg)
