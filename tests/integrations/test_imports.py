"""Without diffusers and transformers the room opens, and says what is missing when it is asked."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

CODE = """
import sys
for name in ("diffusers", "transformers"):
    sys.modules[name] = None
import torch
from rfkernels import integrations
from rfkernels.integrations import comfyui, diffusers, k_diffusion, sageattention, transformers
assert "torch._dynamo" not in sys.modules, "the imports alone take a second for Dynamo"
q = torch.randn(1, 1, 4, 8)
with integrations.sdpa():
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
sageattention.sageattn(q, q, q)
for function in (diffusers.register_attention_backend, transformers.register_attention):
    try:
        function()
    except ImportError as error:
        print(error)
try:
    diffusers.RFEulerScheduler
except ImportError as error:
    print(error)
"""


def test_what_is_missing_is_named():
    path = os.pathsep.join(p for p in sys.path if p and "tests" not in Path(p).parts)
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        cwd=tempfile.gettempdir(),
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "register_attention_backend: needs diffusers 0.35 or later; install it with: "
        'pip install "rfkernels[diffusers]"',
        "register_attention: needs transformers 5 or later; install it with: "
        'pip install "rfkernels[transformers]"',
        "RFEulerScheduler: needs diffusers 0.35 or later; install it with: "
        'pip install "rfkernels[diffusers]"',
    ]
