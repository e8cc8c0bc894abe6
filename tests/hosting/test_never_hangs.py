"""Ranks whose data differ in everything finish, with as many calls to one another as if they were alike."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_tide.data.batch import read_batch
from megatron_tide.diffusion import build_inputs, noise
from megatron_tide.models.experts import Router
from tests.hosting.backends import Collectives, hostings, joined, loader_of, teacher_of
from tests.support.lab import stored
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.ranks
SECONDS = 200  # until a test says that ranks hang
BOUND = 1e-5


@pytest.fixture
def chosen(tmp_path):
    """The hostings of two ranks."""
    return {name: more for name, more in hostings(tmp_path).items() if name != "pipeline_4"}


def batch(loader, indices, t):
    """The noised micro-batch of these samples, masked at rate ``t``; nothing is, where that is next to 0."""
    read = read_batch(loader.data, indices)
    drawn = noise(read, seed=1, epoch=0, masking=loader.masking, t=torch.full((len(indices),), t))
    side = loader.data.manifest["student"]
    return build_inputs(
        read, drawn, student_block=side["block"], student_mask_id=side["mask_id"], teacher=loader.teacher
    )


def cases(loader):
    """By name: the micro-batches of rank 0 and those of rank 1."""
    usual, long, nothing = batch(loader, [0, 1], 0.5), batch(loader, [2, 3, 4, 5], 0.9), batch(loader, [6], 1e-9)
    assert usual.teacher.input_ids.shape[1] != long.teacher.input_ids.shape[1]
    assert len(nothing.teacher_targets) == len(nothing.pair_chunk) == len(nothing.student_targets) == 0
    return {
        "alike": ([usual, usual], [usual, usual]),
        "other lengths": ([usual, usual], [long, long]),
        "nothing masked on one rank": ([nothing, nothing], [usual, long]),
        "nothing masked anywhere": ([nothing, nothing], [nothing, nothing]),
        "uneven": ([usual, long, nothing], [usual]),
        "nothing to ask on one rank": ([usual, nothing, usual, long], []),
        "nothing to ask anywhere": ([], []),
    }


def score_all(flags, chosen):
    """By hosting and case: this rank's calls to others, and how far its answers are from the replicated teacher's."""
    found = {}
    with joined() as world:
        strategy, loader = loader_of(flags, world)
        asked = {name: both[world.rank] for name, both in cases(loader).items()}
        replicated = teacher_of(flags, strategy, world)
        wanted = {name: replicated.score(microbatches) for name, microbatches in asked.items()}
        for hosting, more in chosen.items():
            teacher = teacher_of({**flags, **more}, strategy, world)
            for _ in range(2):  # zero3 records its trace, and compares it over the ranks, once
                teacher.score(asked["alike"])
            for name, microbatches in asked.items():
                with Collectives() as collectives:
                    outputs = teacher.score(microbatches)
                found[hosting, name] = collectives.calls, apart(outputs, wanted[name])
    return found


def apart(outputs, wanted):
    pairs = [
        pair
        for a, w in zip(outputs, wanted, strict=True)
        for pair in ((a.target_logprobs, w.target_logprobs), (a.hidden, w.hidden))
    ]
    return max([(mine - theirs).abs().max().item() for mine, theirs in pairs if mine.numel()], default=0.0)


def test_ranks_that_differ_finish(chain, mixture, chosen):
    flags = chain.run(Path("nowhere"), teacher=str(mixture), strategy="tide-bridge")
    for found in run_on_ranks(score_all, 2, flags, chosen, timeout=SECONDS):
        assert max(off for _, off in found.values()) <= BOUND
        for hosting in chosen:
            calls = {name: made for (asked, name), (made, _) in found.items() if asked == hosting}
            if hosting.startswith("zero3"):
                assert calls["alike"] == ["_allgather_base_"] * 5, "one gather a layer"
            else:  # the case in which there is nothing to send on has fewer
                assert len(calls.pop("nothing to ask anywhere")) > 0
            assert all(made == calls["alike"] for made in calls.values())


@pytest.fixture(scope="module")
def torn(mixture, tmp_path_factory):
    """A teacher that sends even tokens to the first eight of its sixteen experts, and odd ones to the others."""
    folder = tmp_path_factory.mktemp("torn")
    for file in (file for file in mixture.iterdir() if "safetensors" not in file.name):
        shutil.copy(file, folder)
    tensors = stored(mixture)
    side = torch.tensor([1.0, -1.0])
    way = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(0)), dim=0)
    embedding = tensors["model.word_embeddings.weight"]
    embedding += 50 * side[torch.arange(len(embedding)) % 2, None] * way
    for name, tensor in tensors.items():
        if name.endswith("gate.weight"):
            tensor += side[torch.arange(16) // 8, None] * way
        if name.endswith("expert_bias"):
            tensor.zero_()
    save_file(tensors, folder / "model.safetensors")
    return folder


def score_torn(flags, chosen):
    """By hosting: the experts this rank's tokens went to, and how far its answers are from the replicated teacher's."""
    experts, found = set(), {}
    route = Router.forward

    def watched(router, hidden):
        index, weight = route(router, hidden)
        experts.update(index.flatten().tolist())
        return index, weight

    Router.forward = watched
    with joined() as world:
        strategy, loader = loader_of(flags, world)
        microbatches = [of_parity(batch, world.rank) for batch in loader(0)]
        wanted = teacher_of(flags, strategy, world).score(microbatches)
        for hosting, more in chosen.items():
            teacher = teacher_of({**flags, **more}, strategy, world)
            experts.clear()
            off = [apart(teacher.score(microbatches), wanted) for _ in range(3)]
            found[hosting] = set(experts), max(off)
    return found


def of_parity(batch, parity):
    ids = batch.teacher.input_ids // 2 * 2 + parity
    return replace(batch, teacher=replace(batch.teacher, input_ids=ids))


def test_tokens_of_ranks_go_to_other_experts(chain, torn, chosen):
    flags = chain.run(Path("nowhere"), teacher=str(torn), strategy="tide-bridge")
    ranks = run_on_ranks(score_torn, 2, flags, chosen, timeout=SECONDS)
    for hosting in chosen:
        (even, off_even), (odd, off_odd) = (rank[hosting] for rank in ranks)
        assert max(off_even, off_odd) <= BOUND
        if hosting != "pipeline_2":  # there a rank sees everybody's tokens
            assert set() < even <= set(range(8))
            assert set() < odd <= set(range(8, 16))
