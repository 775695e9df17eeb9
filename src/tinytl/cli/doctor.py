"""`tinytl doctor`: print what there is and what is missing."""

from __future__ import annotations

from collections.abc import Iterator

import typer

from tinytl.doctor import Report, examine

from .output import AsJson, print_json, print_line

BROKEN = 2


def doctor(as_json: AsJson = False) -> None:
    """Show versions, threads, memory and what is missing; exit with status 2 where something needed is broken."""
    report = examine()
    if as_json:
        print_json(report.to_json())
    else:
        for line in _lines(report):
            print_line(line)
    if not report.ok:
        raise typer.Exit(BROKEN)


def _lines(report: Report) -> Iterator[str]:
    # no table of `tinytl.report`: its module imports PyTorch, which may be what is broken
    for name, version in report.versions.items():
        yield f"{name:<16}{version or 'missing'}"
    cpu, memory = report.cpu, report.memory
    yield f"{'processor':<16}{cpu['name']}; {', '.join(cpu['instructions']) or 'instructions not known'}"
    yield f"{'cores':<16}{cpu['usable_cores']} of {cpu['cores']} usable"
    settings = ", ".join(f"{key}={value}" for key, value in report.threads["environment"].items())
    yield f"{'threads':<16}{report.threads['torch'] or 'not known'}{f' ({settings})' if settings else ''}"
    limit = "" if memory["limit_bytes"] is None else f", limited to {_size(memory['limit_bytes'])}"
    yield f"{'memory':<16}{_size(memory['available_bytes'])} available of {_size(memory['total_bytes'])}{limit}"
    for name, about in report.folders.items():
        writable = "" if about["writable"] else ", cannot be written"
        yield f"{name:<16}{about['path']}: {_size(about['free_bytes'])} free{writable}"
    yield f"{'compiled passes':<16}{'present' if report.compiled_passes['present'] else 'missing'}"
    yield f"{'executor':<16}{report.executor['isa'] or 'missing'}"
    for about in report.devices:
        yield f"{'CUDA device':<16}{about['name']}, {_size(about['memory_bytes'])}"
    for name, about in report.extras.items():
        found = ", ".join(f"{package} {version}" for package, version in about["versions"].items() if version)
        yield f"{f'[{name}]':<16}{found if about['present'] else about['fault'] or 'not installed'}"
    for finding in report.findings:
        yield f"{finding.level}: {finding.text}"
    if not report.findings:
        yield "nothing is missing"


def _size(count: int | None) -> str:
    return "an unknown size" if count is None else f"{count / 1e9:.1f} GB"
