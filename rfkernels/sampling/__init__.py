"""Samplers: solvers, time grids, guidance, and the two functions that put them together, ``sample``
and ``invert``."""

from rfkernels.sampling.ddim import DDIMGrid, ddim
from rfkernels.sampling.dopri5 import Dopri5
from rfkernels.sampling.fixed import AB2, RK4, Euler, FixedStepSolver, Heun, Midpoint, Taylor
from rfkernels.sampling.flow_map import FlowMap
from rfkernels.sampling.grids import CustomGrid, Grid, ShiftedGrid, UniformGrid, get_grid
from rfkernels.sampling.initial_noise import InitialNoise
from rfkernels.sampling.run import Run, Solution, Solver
from rfkernels.sampling.sample import SampleInfo, invert, sample
from rfkernels.sampling.solvers import get_solver
from rfkernels.sampling.windows import WindowGrid

__all__ = [
    "AB2",
    "RK4",
    "CustomGrid",
    "DDIMGrid",
    "Dopri5",
    "Euler",
    "FixedStepSolver",
    "FlowMap",
    "Grid",
    "Heun",
    "InitialNoise",
    "Midpoint",
    "Run",
    "SampleInfo",
    "ShiftedGrid",
    "Solution",
    "Solver",
    "Taylor",
    "UniformGrid",
    "WindowGrid",
    "ddim",
    "get_grid",
    "get_solver",
    "invert",
    "sample",
]
