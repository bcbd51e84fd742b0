"""Euler, Taylor and linear steps by the compiled kernels."""

from __future__ import annotations

from rfkernels._C import euler_step, linear_step, taylor_step

__all__ = ["euler_step", "linear_step", "taylor_step"]
