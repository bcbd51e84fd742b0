"""Training-free editing on whole pipelines: `edit`, and one adapter for each family of pipelines.

edit.py        the function: its arguments, the order of the work, what it returns
family.py      what is the same in all families: pictures, prompts, latents, grid
families.py    Flux, Flux2, Stable Diffusion 3, Wan
network.py     a pipeline's network as the velocity that is edited with
published.py   steps and scales of the publications
"""

from rfkernels.integrations.diffusers.editing.edit import PipelineEdit, edit

__all__ = ["PipelineEdit", "edit"]
