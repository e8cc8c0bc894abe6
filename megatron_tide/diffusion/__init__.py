"""Clean -> noised: masks, model inputs, and scored positions.

In order: ``masking`` samples the timesteps of ``levels`` and masks (both sides agree chunk by chunk) as its
``noise_schedule`` says, ``compdemo`` splits the masked part into two halves for the teacher's two passes, ``layouts``
arranges tokens as model inputs with their ``attention`` mask, and ``inputs`` turns a batch into one ``DistillBatch``.
All of it runs on the CPU, in the loader, on complete batches: the training step receives row indices and never waits
for the device to learn a size.
"""

from megatron_tide.choices import ATTENTION_LAYOUTS, MASKINGS, NOISE_SCHEDULES
from megatron_tide.diffusion.attention import BlockDiffusionMask, staircase_mask
from megatron_tide.diffusion.compdemo import CompDemo
from megatron_tide.diffusion.inputs import DistillBatch, TeacherLayout, build_inputs
from megatron_tide.diffusion.layouts import AttentionLayout, ModelInput, StudentLayout, mask_of, predicts_next
from megatron_tide.diffusion.levels import NoiseSampling
from megatron_tide.diffusion.masking import ChunkMasking, Masking, Noise, TokenExpandedMasking, noise
from megatron_tide.diffusion.noise_schedule import NoiseSchedule

__all__ = [
    "ATTENTION_LAYOUTS",
    "MASKINGS",
    "NOISE_SCHEDULES",
    "AttentionLayout",
    "BlockDiffusionMask",
    "ChunkMasking",
    "CompDemo",
    "DistillBatch",
    "Masking",
    "ModelInput",
    "Noise",
    "NoiseSampling",
    "NoiseSchedule",
    "StudentLayout",
    "TeacherLayout",
    "TokenExpandedMasking",
    "build_inputs",
    "mask_of",
    "noise",
    "predicts_next",
    "staircase_mask",
]
