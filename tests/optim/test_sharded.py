"""Sharded parameters (FSDP2, DTensor) in two processes are updated as whole ones are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_two_processes_update_as_one():
    program = Path(__file__).with_name("sharded_program.py")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            program,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sharded: passed" in done.stdout
