"""Measure every contender and write the JSON, the page and the picture: `python -m benchmarks.peers [--quick]`.

``--quick`` is a rehearsal: small images, few turns, nothing that compiles, no processes apart. It writes into
runs/peers, as ``--only`` does, and leaves the committed results alone.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe

from .contenders import BASELINE, CONTENDERS
from .measure import compare
from .page import PAGE, PICTURE, RESULTS, draw, page
from .step import Setting

NETWORKS = (Setting(), Setting("efficientnet_lite0", pretrained=True))
QUICK = Path("runs/peers")


def packages() -> dict[str, str]:
    """Versions of the others that are packages of their own and installed."""
    found = {}
    for name in ("peft", "bitsandbytes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The results, as they are committed."""
    keys = options.only or [key for key, entry in CONTENDERS.items() if not (options.quick and entry.compiles)]
    if BASELINE not in keys:
        keys = [BASELINE, *keys]
    turns = options.turns or (3 if options.quick else 21)
    networks = []
    for network in NETWORKS:
        setting = replace(network, resolution=64, batch_size=2) if options.quick else network
        print(f"{setting.backbone}, {setting.resolution} px, batch {setting.batch_size}", flush=True)
        rows = compare(
            setting,
            keys,
            turns=turns,
            rss=not options.quick,
            skip=options.skip,
            say=lambda line: print(f"  {line}", flush=True),
        )
        networks.append({"setting": asdict(setting), "rows": rows})
        torch.compiler.reset()
        gc.collect()
    return {"machine": describe(), "packages": packages(), "turns": turns, "networks": networks}


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--turns", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help=f"a rehearsal, written into {QUICK}")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="these contenders, and the baseline")
    parser.add_argument("--skip", nargs="+", default=[], choices=list(CONTENDERS), help="leave these out, and say so")
    parser.add_argument("--page-only", action="store_true", help="write page and picture from the committed JSON")
    options = parser.parse_args()
    if options.turns is not None and options.turns < 2:
        parser.error(f"--turns is {options.turns}: expected 2 or more, quartiles need them")
    rehearsal = options.quick or options.only
    data, text, picture = (QUICK / path.name if rehearsal else path for path in (RESULTS, PAGE, PICTURE))
    for path in (data, text, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not options.page_only:
        data.write_text(json.dumps(measure(options), indent=2) + "\n")
    results = json.loads(data.read_text())
    text.write_text(page(results))
    draw(results, picture)
    print(page(results))


if __name__ == "__main__":
    main()
