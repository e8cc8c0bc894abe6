"""Clean -> noised: what is masked, what each model is shown, and which rows are scored.

In order: ``masking`` draws the timestep and the masks (both sides agree chunk by chunk), ``compdemo`` splits the masked
part into two halves for the teacher's two passes, ``contexts`` lays tokens out as model inputs with their attention
``patterns``, and ``view`` turns a batch into one ``Noised``. All of it runs on the host, in the loader, on whole
batches: the training step receives row indices and never asks the device for a size.
"""

from megatron_tide.diffusion.compdemo import CompDemo
from megatron_tide.diffusion.contexts import CONTEXTS, Context, ModelInput
from megatron_tide.diffusion.masking import MASKINGS, Expand, Masking, Noise, Synchronous, noise
from megatron_tide.diffusion.patterns import Pattern, staircase_mask
from megatron_tide.diffusion.view import Noised, TeacherView, view

__all__ = [
    "CONTEXTS",
    "MASKINGS",
    "CompDemo",
    "Context",
    "Expand",
    "Masking",
    "ModelInput",
    "Noise",
    "Noised",
    "Pattern",
    "Synchronous",
    "TeacherView",
    "noise",
    "staircase_mask",
    "view",
]
