"""docs/memory-table.md, made from the results of `benchmarks.memory_table`."""

from __future__ import annotations

from typing import Any

from tinytl.cli.table import columns, in_megabytes
from tinytl.memory.plan import StepPlan
from tinytl.memory.table import BATCH, METHODS
from tinytl.report import Column, markdown

from .machine import versions

PAGE = """# Memory of one training step: published, counted, planned, measured

Made by `python -m benchmarks.memory_table`; do not edit. ProxylessNAS-Mobile, 224 px unless marked, 102 classes, a step
of 8 images, Adam at 32 bits unless said; on {processor} ({vector}), {versions}. In MB, 10^6 bytes. A step's
bytes do not depend on how fast a machine is; the width of its vectors moves them by parts of a MB. `tinytl table`
prints such a table for any backbone, norm, batch and micro-batch.

## The paper's table 2

Batch norm with frozen statistics:

{bn}
Exact group norm (8 channels a group) with weight standardization, the paper's own configuration:

{gn}
| column | what is in it |
| --- | --- |
| published | the paper's table 2, in whole MB |
| counted | the paper's rule: weights (trained 32 bits, frozen 8) and the activations of the forward pass, with lite \
residual modules inserted for every method. No gradients, no optimizer state, no input, nothing for backward, and \
group norm as if it were linear. |
| no lite | the same rule on the network that the method itself makes |
| planned | all that is alive at the worst instant of a step: weights as they are held (32 bits), statistics, \
gradients, Adam's state, what is kept, the working set of forward, backward and update, the input of the whole batch \
(held as bytes, float32 a micro-batch at a time). Worked out before anything runs. |
| measured | the same, as PyTorch's allocator saw it in a step that was taken |
| stock | measured, the same method in plain PyTorch (same trained parameters, same frozen statistics), in the memory \
layout with the lower peak |

The methods that make no lite modules are planned and measured without them. In the published column they ride along:
frozen in FT-Last and TinyTL-B, but FT-Norm+Last's 192 and FT-Full's 391 only come out where the modules' norms, and all
of them, train as well.
"""

COUNTED = """## Counted: the same rule, other networks

Against the figures of the authors' own profiler, which are printed with one digit. The largest difference is
{largest:.2f} MB, ResNet-50's FT-Full left out.

{profiler}
**Where the authors' profiler is off.** It runs the network twice: a hook of each layer notes what that layer's last
call cost, and the second pass adds the notes up. ResNet-50 calls one ReLU module three times a block, so each call is
charged what the call before it cost: the block's output is charged to the first ReLU and not to the last. And a block's
input counts as alive until the block's end, where the last ReLU runs after the sum that needed it. For FT-Full the two
move the peak from the last block's 1x1 expansion to its last ReLU: {theirs} MB instead of {ours:.1f} by the rule (the
paper prints 802). `tests/test_memory_counted.py` repeats that walk and gets its figures to the last printed digit;
`counted` charges every call for itself.

Every backbone and method by the rule, 224 px, batch 8, with lite modules only where the method makes them:

{methods}"""

GROUP_NORM = """## Group norm done right

The paper's own configuration is group norm with weight standardization. Group norm's statistics depend on its input, so
its gradient needs the normalized input even where nothing of the norm trains; the paper's count charges nothing for it.
Here the gradients are exact: the norm's input is made again from the block's own input. A step is 8 images in every
row, all at once or one at a time with accumulated gradients, which is the same step (the paper's batch 1 is a step of
one image). TinyTL-L+B unless marked, what is alive at the peak, by what it
is for:

{roles}
*Activations* are what is kept for backward and the working set, operators' own workspaces included. The paper's figures
hold weights (frozen ones at 8 bits) and activations and nothing else. Weights or Adam's state at 8 bits are approximate
(rounded); all else is exact. How the steps with a budget were taken, which `--memory-budget` chose:

{plans}
The same steps with more and more left out, each at its own worst instant. The last column is a figure of the paper's
kind:

{alike}
So what the paper calls 37 MB ({paper_8:.2f}) is, with nothing left out, {all_8:.1f} MB measured with all 8 images at
once and {all_1:.1f} MB with one at a time. Of the latter, {training:.1f} MB are gradients and Adam's state and
{weights:.1f} MB weights at 32 bits. What the paper calls "around 16 MB" at batch 1 (by its own rule {paper_1:.2f}) is
{alike_1:.1f} MB where the gradients through group norm are exact and backward's working set counts, and
{packed_1:.1f} MB with frozen weights at 8 bits, as the paper counts them.
"""


def page(results: dict[str, Any]) -> str:
    """The documentation page of the committed results."""
    return "\n".join((_tables(results), _counted(results), _group_norm(results["group_norm"])))


def _tables(results: dict[str, Any]) -> str:
    machine = results["machine"]
    tables = {norm: markdown(in_megabytes(rows), columns(rows)) for norm, rows in results["tables"].items()}
    return PAGE.format(processor=machine["processor"], vector=machine["vector"], versions=versions(machine), **tables)


def _counted(results: dict[str, Any]) -> str:
    profiler = [Column("backbone", "backbone"), Column("method", "method"), Column("kind", "of")]
    profiler += [Column("theirs_mb", "the authors' profiler"), Column("ours", "counted", digits=2)]
    rows = _scaled(results["profiler"])
    (resnet,) = (row for row in rows if (row["backbone"], row["method"]) == ("resnet50", "ft-full"))
    names = [Column("backbone", "backbone"), *(Column(name, name) for name in METHODS if "@" not in name)]
    return COUNTED.format(
        largest=max(abs(row["ours"] - row["theirs_mb"]) for row in rows if row is not resnet),
        profiler=markdown(rows, profiler),
        theirs=resnet["theirs_mb"],
        ours=resnet["ours"],
        methods=markdown(_scaled(results["counted"]), names),
    )


def _group_norm(results: list[dict[str, Any]]) -> str:
    roles = {
        "name": "",
        "weights": "weights",
        "activations": "activations",
        "kept": "of them kept",
        "input": "input",
        "gradients": "gradients",
        "optimizer": "Adam",
        "planned": "planned",
        "measured": "measured",
        "stock": "stock",
    }
    alike = {
        "name": "",
        "planned": "everything",
        "without_training_state": "no gradients, no Adam",
        "counted_alike": "nor the input",
    }
    rows = [{**dict.fromkeys((*roles, *alike)), **row} for row in _scaled(results)]
    paper_8, paper_1, all_8, all_1, packed_1, *_ = rows
    return GROUP_NORM.format(
        roles=markdown(rows, [Column(key, heading) for key, heading in roles.items()]),
        plans="".join(f"- {row['name']}: {_words(row['plan'])}\n" for row in results if "memory_budget" in row),
        alike=markdown(rows, [Column(key, heading) for key, heading in alike.items()]),
        paper_8=paper_8["counted_alike"],
        paper_1=paper_1["counted_alike"],
        all_8=all_8["measured"],
        all_1=all_1["measured"],
        training=all_1["gradients"] + all_1["optimizer"],
        weights=all_1["weights"],
        alike_1=all_1["counted_alike"],
        packed_1=packed_1["counted_alike"],
    )


def _words(plan: dict[str, Any]) -> str:
    return "; ".join(StepPlan.from_json(plan).lines(BATCH)).replace("features.", "")


def _scaled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with bytes, which are whole numbers, as MB; `images` and bits are no column of a table."""
    return [{key: value / 1e6 if isinstance(value, int) else value for key, value in row.items()} for row in rows]
