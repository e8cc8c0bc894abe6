"""A release as GGUF over llama.cpp: what smaller types cost in quality, and what a pass takes on this machine.

    python -m benchmarks.gguf --release runs/quickstart/hf --data runs/quickstart/test-data \\
        --json benchmarks/results/gguf.json

Quality, of ``--release``: held-out bits per byte (the same masks for every type), the share of masked tokens of which
the most likely one is that of the release in fp32, and the share of greedily written tokens that are its own (after the
first other token a text goes its own way). Beside the files stands the release itself in bf16 through transformers.

Speed, of random weights of the 0.6B shape (a file knows nothing of what its weights are good for): milliseconds of a
pass over one block of 32 with its head on the masks that are left, and tokens a second at one and at ``PER_PASS``
tokens a pass, beside a token of the same file written autoregressively (causal attention, one position a call) and
beside the release in bf16 through transformers. The pass that takes in the prompt is not timed, and ways take turns. On
a machine that others use as well, ``--busy`` counts the CPU time of one thread, which waits for nobody.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import report
from megatron_tide import cli
from megatron_tide.bridge import TextTokenizer, load_tokenizer
from megatron_tide.data import PreparedData
from megatron_tide.data.batch import read_batch
from megatron_tide.evaluate.bootstrap import ratio
from megatron_tide.evaluate.likelihood import MaskedTokens, masked_tokens, scoring_inputs, spread
from megatron_tide.evaluate.likelihood_noise import PER_SAMPLE
from megatron_tide.files import read_json
from megatron_tide.generate import complete, from_prepared
from megatron_tide.models import fresh_model, load_model, masked_hidden_states, write_folder
from megatron_tide.models.decoding_a2d import BlockDecoder
from megatron_tide.models.generation_a2d import decoding_rule
from megatron_tide.models.gguf_model import GgufModel
from megatron_tide.release.gguf import convert_to_gguf

CONFIG = Path(__file__).parents[1] / "megatron_tide/models/configs/qwen3_0.6b.json"
TYPES = ("bf16", "q8_0", "q4_0")
BLOCK, PER_PASS, SEED = 32, 2, 0


def rows_of_release(model: Any, found: MaskedTokens) -> Tensor:
    """Logits of the scored rows, [M, V]."""
    return model.head(masked_hidden_states(model, found.inputs)).float()


def rows_of_file(model: GgufModel, found: MaskedTokens) -> Tensor:
    """The same by llama.cpp, of one sample: a noised block behind the clean ones before it, then the clean block."""
    inputs, block = found.inputs, model.config.block_size
    ids_L, place_L = inputs.input_ids[0].numpy(), inputs.position_ids[0].numpy()
    noised_L, valid_L = inputs.attention.noised[0].numpy(), inputs.attention.valid[0].numpy()
    wanted_L, logits = np.zeros(len(ids_L), bool), []
    wanted_L[inputs.rows.numpy()] = True
    model.llama.reserve(int(place_L.max()) + 1)
    for number in range(int(place_L[wanted_L].max()) // block + 1):
        here_L = valid_L & (place_L // block == number)
        for slots, scored in ((here_L & noised_L, True), (here_L & ~noised_L, False)):
            model.llama.forget(number * block)
            if slots.any() and (wanted_L[slots].any() or not scored):
                logits.append(model.llama.decode(ids_L[slots], place_L[slots], wanted_L[slots]))
    return torch.from_numpy(np.concatenate(logits))


@torch.no_grad()
def likelihood(
    rows_of: Callable[[Any, MaskedTokens], Tensor], model: Any, data: PreparedData, samples: int, passes: int
) -> tuple[np.ndarray, list[Tensor]]:
    """(the bound of each sample in nats [n], the most likely token of each masked one, sample by sample)."""
    scoring, nats, best = scoring_inputs(data, "student"), [], []
    for index in spread(len(data), samples):
        batch, sums = read_batch(data, np.array([index])), 0.0
        for drawn in PER_SAMPLE.draws(batch, batch.student, scoring.block, passes, SEED):
            found = masked_tokens(scoring, batch, drawn)
            if not len(found.targets_M):
                continue
            logits_MV = rows_of(model, found)
            loss_M = torch.nn.functional.cross_entropy(logits_MV, found.targets_M, reduction="none")
            sums += float((loss_M / drawn.inverse_weight[found.level_M]).double().sum())
            best.append(logits_MV.argmax(-1))
        nats.append(sums / passes)
    return np.array(nats), best


def equal_share(ours: list[Any], theirs: list[Any]) -> float:
    """Of tokens at the same place of the same text; what one of the two does not have counts as different."""
    same = sum(int(a == b) for one, other in zip(ours, theirs) for a, b in zip(one, other))
    return same / sum(max(len(one), len(other)) for one, other in zip(ours, theirs))


def quality(release: Path, data: PreparedData, folder: Path, how: argparse.Namespace) -> dict[str, Any]:
    tokenizer = load_tokenizer(release)
    prompts = [prompt.ids for prompt in from_prepared(data, tokenizer, how.prompts)]
    samples = spread(len(data), how.samples)
    size = np.array([data.sample(int(index)).response_bytes for index in samples], dtype=np.float64)

    def measured(rows_of: Callable[[Any, MaskedTokens], Tensor], model: Any) -> tuple[Any, ...]:
        answers = complete(model, tokenizer, prompts, max_new_tokens=how.answer, min_new_tokens=how.answer)
        return *likelihood(rows_of, model, data, how.samples, how.passes), [answer.ids for answer in answers]

    exact = measured(rows_of_release, load_model(release))
    found = {"release, fp32": exact, "release, bf16": measured(rows_of_release, load_model(release, torch.bfloat16))}
    for kind in TYPES:
        file = folder / f"{kind}.gguf"
        convert_to_gguf(release, file, kind)
        found[f"gguf, {kind}"] = measured(rows_of_file, GgufModel(file))
    return {
        name: {
            "bits_per_byte": ratio(nats / math.log(2), size, SEED).to_dict(),
            "minus release in fp32": ratio((nats - exact[0]) / math.log(2), size, SEED).to_dict(),
            "masked tokens that agree": equal_share(best, exact[1]),
            "written tokens that agree": equal_share(answers, exact[2]),
        }
        for name, (nats, best, answers) in found.items()
    }


def random_release(folder: Path, tokenizer: TextTokenizer, layers: int) -> Path:
    """Random weights of the 0.6B shape in bf16, with a small vocabulary's tokenizer: the rest of its ids are unused."""
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("mask", "eos", "pad")}
    config = read_json(CONFIG) | ids | {"block_size": BLOCK} | ({"num_hidden_layers": layers} if layers else {})
    write_folder(fresh_model(config, SEED), folder, torch.bfloat16)
    values = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**values, **ids, "block_size": BLOCK}))
    tokenizer.save(folder)
    return folder


def block_ms(model: Any, prompt: Tensor, clock: Callable[[], float]) -> Iterator[float]:
    """Milliseconds of a pass, without the one that takes in the prompt; each ``next`` writes a block."""
    rule = decoding_rule(model, None, {"max_new_tokens": BLOCK, "min_new_tokens": BLOCK, "tokens_per_step": PER_PASS})
    while True:
        decoder, begun = BlockDecoder(model, [prompt], rule, [SEED]), 0.0
        for _ in decoder.run():
            begun = begun or clock()
        yield 1000 * (clock() - begun) / (decoder.passes - 1)


def ordered_ms(model: GgufModel, prompt: Tensor, clock: Callable[[], float]) -> Iterator[float]:
    """Milliseconds of a token written from left to right."""
    count, one = BLOCK // PER_PASS, np.ones(1, bool)
    while True:
        model.llama.reserve(len(prompt) + count, causal=True)
        logits_RV = model.llama.decode(
            prompt.numpy(), np.arange(len(prompt)), np.arange(len(prompt)) == len(prompt) - 1
        )
        begun = clock()
        for place in range(len(prompt), len(prompt) + count - 1):
            logits_RV = model.llama.decode(logits_RV.argmax(-1), np.array([place]), one)
        yield 1000 * (clock() - begun) / (count - 1)


def speed(tokenizer: TextTokenizer, folder: Path, how: argparse.Namespace) -> dict[str, Any]:
    release = random_release(folder / "0.6b", tokenizer, how.layers)
    size = {"release, bf16": sum(file.stat().st_size for file in release.glob("*.safetensors"))}
    prompt, clock = torch.arange(BLOCK) % tokenizer.pad_id, time.process_time if how.busy else time.perf_counter
    ways: dict[str, Iterator[float]] = {"release, bf16": block_ms(load_model(release, torch.bfloat16), prompt, clock)}
    for kind in TYPES:
        file = folder / f"random-{kind}.gguf"
        convert_to_gguf(release, file, kind)
        size[f"gguf, {kind}"] = file.stat().st_size
        model = GgufModel(file)
        ways |= {
            f"gguf, {kind}": block_ms(model, prompt, clock),
            f"gguf, {kind}, autoregressive": ordered_ms(model, prompt, clock),
        }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(how.rounds):
        for name, way in ways.items():
            taken[name].append(next(way))
    figures: dict[str, Any] = {}
    for name, times in taken.items():
        ms = float(np.median(times))
        figures[name] = {"ms a pass": ms, "rounds": times, "tokens a second": 1000 / ms}
        if "autoregressive" not in name:
            figures[name] |= {f"tokens a second at {PER_PASS} a pass": PER_PASS * 1000 / ms, "MB": size[name] / 1e6}
    return figures


def main(argv: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", type=Path, required=True, help="a release of Qwen3's shape")
    parser.add_argument("--data", type=Path, required=True, help="prepared data that it was not trained on")
    parser.add_argument("--samples", type=int, default=80, help="number of samples for bits per byte")
    parser.add_argument("--passes", type=int, default=4, help="timesteps for each of them")
    parser.add_argument("--prompts", type=int, default=20, help="number of prompts to answer")
    parser.add_argument("--answer", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is timed")
    parser.add_argument("--layers", type=int, default=0, help="layers of the timed model (0: all 28)")
    parser.add_argument("--threads", type=int, default=2, help="threads of either program")
    parser.add_argument("--busy", action="store_true", help="time one thread's CPU seconds, not those of the clock")
    parser.add_argument("--json", help="also write the figures to this file")
    how = parser.parse_args(argv)
    torch.set_num_threads(1 if how.busy else how.threads)
    with tempfile.TemporaryDirectory() as scratch:
        figures = {
            "settings": {name: value for name, value in vars(how).items() if type(value) in (int, bool)},
            "quality": quality(how.release, PreparedData.open(how.data), Path(scratch), how),
            "speed": speed(load_tokenizer(how.release), Path(scratch), how),
        }
    report("gguf", figures, how.json)


if __name__ == "__main__":
    cli.run(main)
