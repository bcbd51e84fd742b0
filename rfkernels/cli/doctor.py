"""`rfkernels doctor`: what is installed, what the machine can do, and which backend serves which op, with reasons."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import rfkernels
from rfkernels.cli.output import console

_PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "safetensors",
    "scikit-learn",
    "mlxtend",
    "scipy",
    "matplotlib",
    "Pillow",
    "diffusers",
)


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="The same as one JSON object, for programs.")
    ] = False,
) -> None:
    """Show versions, CPU and GPUs, and the op x backend table with the reason of every empty cell.

    [bold]Examples[/]

      rfkernels doctor

      rfkernels doctor --json
    """
    report = system_report()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    _show(report)


def system_report() -> dict[str, Any]:
    """What `doctor --json` prints: versions, cpu, gpus, backends, each in JSON values."""
    return {
        "versions": {
            "rfkernels": rfkernels.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
            "cuda of torch": torch.version.cuda,
        },
        "system": {
            "platform": platform.platform(),
            "executable": sys.executable,
            "installed at": _home(),
        },
        "cpu": _cpu(),
        "gpus": _gpus(),
        "backends": rfkernels.backend_table(),
        "attention": _attention(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _home() -> str:
    return str(Path(rfkernels.__file__).resolve().parent)


def _cpu() -> dict[str, Any]:
    """The CPU and the native kernels: instruction set level detected, used and capped; None where none can be asked."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "RFK_MAX_ISA": os.environ.get("RFK_MAX_ISA"),
        "ISA detected": None,
        "ISA used": None,
        "OpenMP": None,
        "CUDA kernels for": None,
    }
    try:
        from rfkernels import _C
    except ImportError:
        return found
    return found | {
        "ISA detected": _C.isa_detected(),
        "ISA used": _C.isa_used(),
        "OpenMP": _C.has_openmp(),
        "CUDA kernels for": _C.cuda_archs() or None,
    }


def _attention() -> dict[str, Any]:
    """What "int8" means here, the kernels' instruction set level, and when PyTorch's attention serves a call instead."""
    from rfkernels.backends.attention_schemes import resolve
    from rfkernels.ops._attention_handover import rules

    found: dict[str, Any] = {"int8 on the CPU": resolve("int8", "cpu", 64, None), "ISA": None}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        capability = torch.cuda.get_device_capability(index)
        for head_dim in (64, 128):
            name = f"int8 on GPU {index}, head size {head_dim}"
            found[name] = resolve("int8", "cuda", head_dim, capability)
    try:
        from rfkernels import _C
    except ImportError:
        pass
    else:
        found["ISA"] = _C.attention_isa()
    return found | {"handed over to PyTorch": rules()}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "compute capability": f"{properties.major}.{properties.minor}",
                "memory GiB": round(properties.total_memory / 2**30, 1),
            }
        )
    return gpus


def _facts(report: dict[str, Any]) -> Table:
    """Versions and the machine."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, version in report["versions"].items():
        facts.add_row(name, version or "[dim]-[/]")
    facts.add_row("", "")
    for name, value in report["system"].items():
        facts.add_row(name, value)
    cpu = report["cpu"]
    facts.add_row(
        "CPU", f"{cpu['machine']}, {cpu['cores']} cores, threads in use: {cpu['threads']}"
    )
    cap = (
        f"capped by RFK_MAX_ISA={cpu['RFK_MAX_ISA']}"
        if cpu["RFK_MAX_ISA"]
        else "RFK_MAX_ISA not set"
    )
    used, detected = cpu["ISA used"], cpu["ISA detected"]
    facts.add_row(
        "ISA",
        f"{used} (the CPU has {detected}; {cap})"
        if used
        else f"[dim]no native kernels here[/] ({cap})",
    )
    if used:
        facts.add_row(
            "native build",
            f"OpenMP: {_yes(cpu['OpenMP'])}; CUDA kernels: {cpu['CUDA kernels for'] or 'none'}",
        )
    facts.add_row("GPUs", "\n".join(_gpu_line(gpu) for gpu in report["gpus"]) or "none")
    return facts


def _show(report: dict[str, Any]) -> None:
    console.print(_facts(report))
    console.print()
    console.print(_backend_table(report["backends"]))
    reasons: dict[str, list[str]] = {}
    for row in report["backends"]:
        if not row["available"]:
            where = reasons.setdefault(str(row["reason"]), [])
            if _column(row) not in where:
                where.append(_column(row))
    if reasons:
        console.print("\n[bold]Why a cell is empty[/]")
        for number, (reason, where) in enumerate(reasons.items(), start=1):
            console.print(f"  {number}  {', '.join(where)}: {reason}", soft_wrap=True)
    attention = dict(report["attention"])
    handed = attention.pop("handed over to PyTorch")
    console.print("\n[bold]Attention[/]")
    console.print(
        "  " + "; ".join(f"{name}: {value or 'none'}" for name, value in attention.items()),
        soft_wrap=True,
    )
    console.print("  handed over to PyTorch's attention, and counted by rf.attention_stats():")
    for sentence in handed:
        console.print(f"  - {sentence}", soft_wrap=True)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _gpu_line(gpu: dict[str, Any]) -> str:
    return f"{gpu['name']}, compute capability {gpu['compute capability']}, {gpu['memory GiB']} GiB"


def _column(row: dict[str, Any]) -> str:
    return f"{row['backend']} ({row['device']})"


def _backend_table(rows: list[dict[str, Any]]) -> Table:
    """Ops down, backends across; an empty cell carries the number of its reason below the table."""
    table = Table(
        title="Which backend serves which op",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )
    columns = list(dict.fromkeys(_column(row) for row in rows))
    reasons = list(dict.fromkeys(str(row["reason"]) for row in rows if not row["available"]))
    table.add_column("op", style="bold", min_width=max(len(str(row["op"])) for row in rows))
    for column in columns:
        table.add_column(column, justify="center")
    for op in dict.fromkeys(row["op"] for row in rows):
        cells = {_column(row): row for row in rows if row["op"] == op}
        table.add_row(
            str(op),
            *(
                ""
                if cell is None
                else "[green]yes[/]"
                if cell["available"]
                else f"[dim]no ({reasons.index(str(cell['reason'])) + 1})[/]"
                for cell in (cells.get(column) for column in columns)
            ),
        )
    return table
