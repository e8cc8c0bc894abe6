"""The held-out bound the plain way: one sample and one pass at a time, whole logits, Python loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from megatron_tide.data import PreparedData
from megatron_tide.data.batch import Tokens, read_batch
from megatron_tide.diffusion import MASKINGS, noise, staircase_mask
from tests.reference.noise import draws, sampled


@torch.no_grad()
def likelihood(
    model: Any, data: PreparedData, side: str, *, mc_samples: int, seed: int, grid: Any, from_answer: bool = False
) -> dict[str, float]:
    """Bits per byte and masked-token accuracy over all of ``data``; ``grid(key)`` gives a sample's timesteps.

    ``from_answer``: blocks begin at the response, and the last one is filled with end of text.
    """
    manifest = data.manifest[side]
    nats = size = right = masked = 0.0
    for index in range(len(data)):
        batch = read_batch(data, [index])
        size += data.sample(index).response_bytes
        lead = -int(getattr(batch, side).prompt[0]) % manifest["block"] if from_answer else 0
        tokens = filled(getattr(batch, side), manifest, lead) if from_answer else getattr(batch, side)
        batch = replace(batch, **{side: tokens})
        for k, t in enumerate(grid(int(batch.keys[0]))):
            drawn = noise(batch, seed=seed, epoch=k, masking=MASKINGS["synchronous"], t=torch.tensor([t]))
            length = int(tokens.length[0])
            ids, hidden = tokens.ids[:, :length], getattr(drawn, f"{side}_masked")[:, :length]
            logits = two_copies(model, ids, hidden, manifest["block"], manifest["mask_id"], lead)
            for position in range(int(tokens.prompt[0]), int(tokens.content_end[0]) + 1):
                unaligned = tokens.chunk[0, position] < 0 and not data.student_only
                if unaligned or not hidden[0, position]:
                    continue
                gold = int(tokens.ids[0, position])
                nats += -float(torch.log_softmax(logits[position].double(), -1)[gold]) / float(t) / mc_samples
                right += float(int(logits[position].argmax()) == gold)
                masked += 1
    return {"bits_per_byte": nats / math.log(2.0) / size, "accuracy": right / masked}


def filled(tokens: Tokens, manifest: dict[str, Any], lead: int) -> Tokens:
    """One sample, its last block filled with end of text: each is masked as the one before it is, by chunk or alone."""
    length = int(tokens.length[0])
    if int(tokens.ids[0, length - 1]) != manifest["eos_id"]:  # a cut response
        return tokens
    fill = -(lead + length) % manifest["block"]
    sides = ((one[:, :length], one[:, length - 1 : length].expand(-1, fill)) for one in (tokens.ids, tokens.chunk))
    ids, chunk = (torch.cat(parts, 1) for parts in sides)
    return replace(tokens, ids=ids, chunk=chunk, length=tokens.length + fill)


@torch.no_grad()
def likelihood_by_block(model: Any, data: PreparedData, side: str, *, mc_samples: int, seed: int) -> dict[str, float]:
    """Bits per byte and masked-token accuracy with timesteps per block and exact counts, over all of ``data``."""
    manifest = data.manifest[side]
    block, nats, size, right, masked = manifest["block"], 0.0, 0.0, 0.0, 0.0
    for index in range(len(data)):
        batch, size = read_batch(data, [index]), size + data.sample(index).response_bytes
        tokens = batch.student if side == "student" else batch.teacher
        length, prompt = int(tokens.length[0]), int(tokens.prompt[0])
        chunk_of, key = tokens.chunk[0, :length].tolist(), int(batch.keys[0])
        sample = {"key": key, "chunks": int(batch.chunks[0]), "student_chunk": chunk_of, "student_prompt": prompt}
        u = draws(seed, 0, key, "likelihood", (length - 1) // block - prompt // block + 1)
        for k in range(mc_samples):
            times = [((k + j) % mc_samples + u_j) / mc_samples for j, u_j in enumerate(u)]
            form = {"block": block, "stratified": False, "exact": True, "uniforms": times}
            rates, level_of, (hidden, _, _) = sampled(sample, seed, k, "synchronous", **form)
            if side == "teacher":  # response tokens outside all chunks are always masked there
                hidden = [mask or (i >= prompt and chunk_of[i] < 0) for i, mask in enumerate(hidden)]
            ids = tokens.ids[:, :length]
            logits = two_copies(model, ids, torch.tensor([hidden]), block, manifest["mask_id"])
            for position in range(prompt, int(tokens.content_end[0]) + 1):
                if not hidden[position] or (chunk_of[position] < 0 and not data.student_only):
                    continue
                gold = int(ids[0, position])
                weight = 1 / rates[level_of[position - prompt]][1]
                nats += -float(torch.log_softmax(logits[position].double(), -1)[gold]) * weight / mc_samples
                right += float(int(logits[position].argmax()) == gold)
                masked += 1
    return {"bits_per_byte": nats / math.log(2.0) / size, "accuracy": right / masked}


def two_copies(
    model: Any, ids: torch.Tensor, masked: torch.Tensor, block: int, mask_id: int, lead: int = 0
) -> torch.Tensor:
    """Logits [S, V] of the noised copy of one sample, under the full staircase; its first block is ``lead`` short."""
    length = ids.shape[1]
    both = torch.cat((ids.masked_fill(masked, mask_id), ids), 1)
    positions = torch.arange(length).repeat(2).unsqueeze(0)
    seen = [*range(lead, lead + length), *range(2 * lead + length, 2 * (lead + length))]
    attend = staircase_mask(lead + length, block)[seen][:, seen][None, None]
    return model(both, attention_mask=attend, position_ids=positions).logits[0, :length]
