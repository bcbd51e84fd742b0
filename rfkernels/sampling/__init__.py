"""Samplers: solvers, time grids, guidance, and the functions that put them together: ``sample``,
``invert``, ``reconstruct``, ``log_likelihood``."""

from rfkernels.sampling.adams import AB2, AB3
from rfkernels.sampling.cuda_graph import forget_graphs
from rfkernels.sampling.curved import CurvedEuler
from rfkernels.sampling.ddim import DDIMGrid, ddim
from rfkernels.sampling.dopri5 import Dopri5
from rfkernels.sampling.exponential import DPMSolver, UniPC
from rfkernels.sampling.fixed import RK4, Euler, FixedStepSolver, Heun, Midpoint
from rfkernels.sampling.flow_map import FlowMap
from rfkernels.sampling.grids import CustomGrid, Grid, ShiftedGrid, UniformGrid, get_grid
from rfkernels.sampling.guidance import ClassifierFree, Guidance, Interval
from rfkernels.sampling.guidance_kinds import CFGZero, Projected, Rescaled
from rfkernels.sampling.initial_noise import InitialNoise
from rfkernels.sampling.lagged import FireFlow, UniInv
from rfkernels.sampling.level_grids import (
    BetaGrid,
    ExponentialGrid,
    KarrasGrid,
    ResolutionShiftedGrid,
    StretchedGrid,
    resolution_shift,
)
from rfkernels.sampling.likelihood import LogLikelihood, log_likelihood
from rfkernels.sampling.optimised_grid import OptimisedGrid, optimise_grid
from rfkernels.sampling.reconstruct import Reconstruction, reconstruct
from rfkernels.sampling.run import Run, Solution, Solver
from rfkernels.sampling.sample import SampleInfo, invert, sample
from rfkernels.sampling.solvers import SOLVERS, evaluations, get_solver, steps_within
from rfkernels.sampling.stochastic import SDE, Ancestral, Renoise
from rfkernels.sampling.taylor import Taylor
from rfkernels.sampling.windows import WindowGrid

__all__ = [
    "AB2",
    "AB3",
    "RK4",
    "SDE",
    "SOLVERS",
    "Ancestral",
    "BetaGrid",
    "CFGZero",
    "ClassifierFree",
    "CurvedEuler",
    "CustomGrid",
    "DDIMGrid",
    "DPMSolver",
    "Dopri5",
    "Euler",
    "ExponentialGrid",
    "FireFlow",
    "FixedStepSolver",
    "FlowMap",
    "Grid",
    "Guidance",
    "Heun",
    "InitialNoise",
    "Interval",
    "KarrasGrid",
    "LogLikelihood",
    "Midpoint",
    "OptimisedGrid",
    "Projected",
    "Reconstruction",
    "Renoise",
    "Rescaled",
    "ResolutionShiftedGrid",
    "Run",
    "SampleInfo",
    "ShiftedGrid",
    "Solution",
    "Solver",
    "StretchedGrid",
    "Taylor",
    "UniInv",
    "UniPC",
    "UniformGrid",
    "WindowGrid",
    "ddim",
    "evaluations",
    "forget_graphs",
    "get_grid",
    "get_solver",
    "invert",
    "log_likelihood",
    "optimise_grid",
    "reconstruct",
    "resolution_shift",
    "sample",
    "steps_within",
]
