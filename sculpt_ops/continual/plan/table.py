"""A `Plan` as text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from .result import Plan, Row, Setting

__all__ = ["show_plan"]

COLUMNS = ("weights", "bases", "gradients", "states", "activations", "peak", "in backward", "step, least")
WIDTHS = [max(len(column) + 2, 8) for column in COLUMNS]
# Bytes to spare below which a setting may not fit after all; a guess, which no measurement stands behind.
TIGHT = 2 * 10**9


def show_plan(plan: Plan) -> str:
    """A table of every setting in GB of 10^9 bytes, what was counted, and the cheapest setting if a GPU was given."""
    batch = f"{plan.rows} x {plan.length} tokens a forward pass"
    checkpointing = ", gradient checkpointing" if plan.gradient_checkpointing else ""
    lines = [
        f"{plan.model}: {plan.parameters:,} parameters, {plan.protected:,} of them in {plan.matrices} matrices to "
        f"protect, sides {plan.sides}; {batch}{checkpointing}",
    ]
    width = max(len(_label(row.setting)) for row in plan.settings) + 2
    for (dtype, autocast), rows in groupby(plan.settings, key=lambda row: (row.setting.dtype, row.setting.autocast)):
        weights = f"{dtype} weights{', bf16 autocast' if autocast else ''}; GB"
        lines += ["", f"{weights:<{width}}{''.join(f'{c:>{w}}' for c, w in zip(COLUMNS, WIDTHS, strict=True))}"]
        lines += [_line(plan, row, width) for row in rows]
    return "\n".join([*lines, "", *_notes(plan), *(_verdict(plan) if plan.gpu_given else ())])


def _label(setting: Setting) -> str:
    if setting.method != "sculpt":
        return f"  {setting.method}" if setting.protect is None else f"  {setting.protect}  {setting.method}"
    master = () if setting.master == "none" else (setting.master,)
    basis = () if setting.basis_dtype is None else ("bf16 bases",)
    return f"  {setting.protect}  {', '.join((setting.state, *master, *basis))}"


def _line(plan: Plan, row: Row, width: int) -> str:
    label = f"{_label(row.setting):<{width}}"
    memory = row.memory
    if memory is None:
        return f"{label}  {row.note}"
    kept = (memory.weights, memory.bases, memory.gradients, memory.states, memory.activations)
    cells = [_gigabytes(value) if value else "-" for value in kept]
    for peak in (memory.peak, memory.peak_in_backward):
        over = "!" if plan.gpu_given and peak is not None and peak > plan.gpu.memory else ""
        cells.append("-" if peak is None else _gigabytes(peak) + over)
    cells.append("-" if row.seconds is None else _seconds(row.seconds))
    return label + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


def _notes(plan: Plan) -> list[str]:
    return [
        "full, subspace: shape of Adam's moments. split, stochastic: how bfloat16 weights keep small steps; AdamW and",
        "mini_trainer lose those, and have moments in the weights' dtype.",
        "activations: counted in a run of the model's code without values, attention fused, no padding, with logits.",
        "in backward: the peak if weights are stepped in the backward pass. No peak includes the CUDA context or "
        "fragmentation. !: more than the GPU has.",
        f"step: a floor, not measured: {plan.gpu.bandwidth / 1e12:g} TB/s and {plan.gpu.products / 1e12:g} TFLOP/s "
        f"({plan.gpu.source}).",
    ]


def _verdict(plan: Plan) -> Iterator[str]:
    yield (
        f"Cheapest of ours that fits {plan.gpu.name} (least time; within 5 % of it split before stochastic, a "
        "step after the backward pass, float32 bases, the smallest):"
    )
    for protect in plan.protects:
        best, smallest = plan.cheapest(protect), plan.smallest(protect)
        if best is not None:
            spare = plan.gpu.memory - best.peak
            tight = " (tight: the CUDA context and fragmentation come on top)" if spare < TIGHT else ""
            yield f"  {_flags(best.setting)}: {_gigabytes(best.peak)} GB, {_gigabytes(spare)} GB to spare{tight}"
            continue
        less = "fewer --tokens take less" if plan.gradient_checkpointing else "--gradient-checkpointing takes less"
        yield f"  none; {_flags(smallest.setting)}: {_gigabytes(smallest.peak - plan.gpu.memory)} GB too many ({less})"


def _flags(setting: Setting) -> str:
    """As `sculpt train` takes them."""
    flags = [f"--protect {setting.protect} --state {setting.state} --dtype {setting.dtype}"]
    flags += ["--bf16"] if setting.autocast else []
    flags += [] if setting.master == "none" else [f"--master {setting.master}"]
    flags += [] if setting.basis_dtype is None else [f"--basis-dtype {setting.basis_dtype}"]
    flags += ["--fuse-backward --max-grad-norm 0"] if setting.in_backward else []
    return " ".join(flags)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}" if size < 9.995e9 else f"{size / 1e9:.1f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
