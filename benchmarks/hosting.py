"""A teacher on disk: our sweep against the plain way; and its experts: grouped matmul against the machine's limits.

The sweep. Both ways host the same random teacher by DeepSpeed ZeRO-3 with NVMe offload (which reads past the page
cache), score the same tokens of the same micro-batches with CompDemo, and must agree before anything is timed.

  plain   the ordinary module; one whole forward per micro-batch and half, so the teacher is read that many times
  ours    layers of one tensor; every layer serves all micro-batches, so the teacher is read once

The plain way prefetches: its buckets hold a whole layer, its buffers several tensors ahead, and its trace is complete
before timing. The teacher has the real widths, but two of the layers with experts, and a vocabulary cut alike, so that
the head keeps its share. Tokens are the positions that the teacher computes: micro-batches x samples x length x 2
halves. The longer the samples, the more of the sweep is computing, and the less is gained by reading once.

The experts. One layer's, at the real sizes: E stacked experts by ``Experts``, whose time is compared with the
roofline's: bytes of weights over what the machine reads, or FLOPs over what a large matmul does, whichever takes
longer, both measured in the same run. Bytes over seconds look poor at 32 rows an expert, and the weights are not why:
the same work with the weights of one expert, which stay in the cache (``experts_in_cache_seconds``), takes half
to three quarters of the time on CPUs without AMX. That is oneDNN's matmul of few rows; the read stands before it and
does not overlap. Page faults and huge pages have no part in it. What helps is more rows an expert, and a sweep gives it
those of all micro-batches. ``loop_seconds`` is ``torch.mm`` for one expert after the other, which must give the same
numbers.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.common import paired_seconds, report
from megatron_tide import cli
from megatron_tide.data.batch import Batch, Tokens
from megatron_tide.diffusion import (
    ATTENTION_LAYOUTS,
    ChunkMasking,
    CompDemo,
    DistillBatch,
    TeacherLayout,
    build_inputs,
    noise,
)
from megatron_tide.ds_config import read_ds_config
from megatron_tide.files import read_json, write_json
from megatron_tide.hosting.zero3 import Zero3Teacher
from megatron_tide.machine import matmul_rate
from megatron_tide.models.checkpoint_keys import checkpoint_table, module_tensors
from megatron_tide.models.experts import Experts
from megatron_tide.models.families import meta_model, read_config
from megatron_tide.models.layer_specs import layer_specs_of
from megatron_tide.models.shards import ShardedFolder, write_shards
from megatron_tide.train.distributed import destroy_distributed, init_distributed

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "megatron_tide/models/configs/llada2_mini.json"
FAMILY, _ = read_config(CONFIG)
DEEPSPEED = ROOT / "ds_configs/teacher_zero3_nvme.json"
PLAIN_BUFFERS = 8  # tensors of the plain way in memory: those at work, and several ahead
PROMPT, T = 0.25, 0.5  # share of a sample, rate of masking
SPREAD = 0.035  # weights are uniform within +-this: a standard deviation of 0.02
GOLD = SimpleNamespace(needs_target_logprobs=True, needs_hidden=False)
AGREE = 0.05  # of the spread of log-probs
SEED = 0


def random_tensor(key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The tensor that a checkpoint key stands for: the same on every call."""
    if FAMILY.keeps_precision(key):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.empty(shape, dtype=dtype).uniform_(-SPREAD, SPREAD, generator=generator)


def write_teacher(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> int:
    """A random teacher as safetensors in hub format, one shard in memory at a time; -> bytes of its tensors."""
    tensors = module_tensors(meta_model(config))
    pairs = (
        (key, random_tensor(key, slot.of(tensors).shape, dtype))
        for key, slot in checkpoint_table(tensors, FAMILY).items()
    )
    total = write_shards(folder, pairs, 10**9)
    write_json(folder / "config.json", config)
    return total


def make_microbatches(config: dict[str, Any], micro_batches: int, samples: int, length: int) -> list[DistillBatch]:
    """Micro-batches of random tokens, each a chunk of its own, as a CompDemo teacher with full context sees them."""
    asked = TeacherLayout(ATTENTION_LAYOUTS["full"], config["block_size"], config["mask_token_id"], CompDemo())
    generator = torch.Generator().manual_seed(SEED)
    prompt, whole = int(length * PROMPT), torch.full((samples,), length)
    microbatches = []
    for number in range(micro_batches):
        tokens = Tokens(
            ids=torch.randint(config["mask_token_id"], (samples, length), generator=generator),
            chunk=(torch.arange(length) - prompt).clamp(min=-1).repeat(samples, 1).int(),
            length=whole,
            prompt=torch.full_like(whole, prompt),
            content_end=whole - 1,
        )
        keys = torch.arange(samples) + number * samples
        batch = Batch(keys=keys, student=tokens, teacher=tokens, chunks=whole - prompt)
        rate = torch.full((samples,), T, dtype=torch.float64)
        drawn = noise(batch, seed=SEED, epoch=0, masking=ChunkMasking(), t=rate)
        microbatches.append(
            build_inputs(batch, drawn, student_block=asked.block, student_mask_id=asked.mask_id, teacher=asked)
        )
    return microbatches


class PlainTeacher:
    """The ordinary module in a DeepSpeed engine, as one would set it up by hand; a forward per micro-batch and half."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, settings: dict[str, Any]) -> None:
        import deepspeed

        model: Any = meta_model(config).to(dtype)
        largest = max(tensor.numel() for tensor in model.parameters())
        layer = max(sum(tensor.numel() for tensor in part.parameters()) for part in model.model.layers)
        settings = _plain_settings(settings, largest, layer, dtype)
        layers = [f"model.layers.{number}" for number in range(len(model.model.layers))]
        swapper = None
        for path in ("model.word_embeddings", *layers, "model.norm", "lm_head"):
            part = model.get_submodule(path).to_empty(device="cpu")
            tensors = {f"{path}.{name}": tensor.detach() for name, tensor in module_tensors(part).items()}
            for key, slot in checkpoint_table(tensors, FAMILY).items():
                slot.of(tensors).copy_(random_tensor(key, slot.of(tensors).shape, dtype))
            del tensors
            context = deepspeed.zero.Init(module=part, config_dict_or_path=settings, param_swapper=swapper)
            swapper = context.param_swapper
        self.engine, *_ = deepspeed.initialize(model=model.eval().requires_grad_(False), config=settings)

    @torch.no_grad()
    def score(self, microbatches: list[DistillBatch]) -> list[Tensor]:
        """Gold log-probs [R] of each micro-batch."""
        return [self._score(noised) for noised in microbatches]

    def _score(self, noised: DistillBatch) -> Tensor:
        asked = noised.teacher
        assert asked is not None
        sequence, position = asked.rows // asked.input_ids.shape[1], asked.rows % asked.input_ids.shape[1]
        mask = asked.attention.dense()
        gold = torch.empty(len(asked.rows))
        samples = len(noised.rate)
        for start in (0, samples):
            half = slice(start, start + samples)
            logits = self.engine(asked.input_ids[half], mask[half], asked.position_ids[half]).logits
            mine = (sequence >= start) & (sequence < start + samples)
            rows = logits[sequence[mine] - start, position[mine]].float()
            gold[mine] = rows.log_softmax(-1).gather(1, noised.teacher_targets[mine, None])[:, 0]
        return gold


def _plain_settings(settings: dict[str, Any], largest: int, layer: int, dtype: torch.dtype) -> dict[str, Any]:
    settings = {**settings, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": dtype == torch.bfloat16}}
    zero = dict(settings["zero_optimization"])
    offload = {**zero["offload_param"], "buffer_count": PLAIN_BUFFERS, "buffer_size": largest, "max_in_cpu": 0}
    zero |= {"offload_param": offload, "stage3_prefetch_bucket_size": layer, "stage3_max_live_parameters": 3 * layer}
    # A tensor that is let go is not wanted again before the next forward.
    return {**settings, "zero_optimization": {**zero, "stage3_max_reuse_distance": 0}}


def bytes_read() -> int:
    """What this process has read from disks."""
    for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise ValueError("/proc/self/io has no read_bytes: this benchmark counts bytes on Linux only")


def counted(way: Callable[[], object]) -> int:
    """Bytes that one call of ``way`` reads from disks."""
    before = bytes_read()
    way()
    return bytes_read() - before


def sweep_figures(options: argparse.Namespace, disk: Path) -> dict[str, Any]:
    """Both ways of scoring micro-batches from disk; everything that is written lies in ``disk``."""
    dtype = getattr(torch, options.dtype)
    config = {**read_json(options.config), "num_hidden_layers": options.layers, "first_k_dense_replace": 0}
    config |= {"vocab_size": options.vocabulary, "mask_token_id": options.vocabulary - 1}
    config |= {"pad_token_id": 0, "eos_token_id": 0}
    microbatches = make_microbatches(config, options.micro_batches, options.samples, options.length)
    source = disk / "teacher"
    settings = {}
    for folder in ("teacher", "ours", "plain"):
        (disk / folder).mkdir()
        settings[folder] = read_ds_config(str(DEEPSPEED), "benchmarks/hosting.py")
        settings[folder]["zero_optimization"]["offload_param"]["nvme_path"] = str(disk / folder)
    teacher_bytes = write_teacher(source, config, dtype)
    world = init_distributed()
    sweep = Zero3Teacher(layer_specs_of(source), ShardedFolder(source), settings["ours"], dtype, GOLD, world)
    for path in source.iterdir():
        path.unlink()  # on disk are never more than two copies
    plain = PlainTeacher(config, dtype, settings["plain"])

    difference = _difference(sweep, plain, microbatches)
    little = make_microbatches(config, 1, 1, config["block_size"])
    ways = [lambda: plain.score(microbatches), lambda: sweep.score(microbatches), lambda: sweep.score(little)]
    plain_bytes, our_bytes, _ = map(counted, ways)  # the traces of both are complete after this
    plain_seconds, our_seconds, disk_seconds = paired_seconds(ways, options.rounds, warmup=0)
    tokens = 2 * options.micro_batches * options.samples * options.length
    return {
        "sweep_speedup": plain_seconds / our_seconds,
        "plain_seconds": plain_seconds,
        "sweep_seconds": our_seconds,
        "plain_tokens_per_second": tokens / plain_seconds,
        "sweep_tokens_per_second": tokens / our_seconds,
        "plain_bytes_read": plain_bytes,
        "sweep_bytes_read": our_bytes,
        "teacher_bytes": teacher_bytes,
        "disk_seconds": disk_seconds,
        "disk_bytes_per_second": our_bytes / disk_seconds,
        "matmul_flops_per_second": matmul_rate(dtype),
        # Where computing takes as long as reading, if computing takes as long as it did per token.
        "tokens_for_compute_to_equal_disk": round(tokens * disk_seconds / our_seconds),
        "log_prob_difference_over_spread": difference,
        "tokens": tokens,
        "scored_rows": sum(len(noised.teacher_targets) for noised in microbatches),
        "micro_batches": options.micro_batches,
        "plain_forwards": 2 * options.micro_batches,
        "shape": {name: config[name] for name in ("hidden_size", "num_hidden_layers", "num_experts", "vocab_size")},
    }


def _difference(sweep: Zero3Teacher, plain: PlainTeacher, microbatches: list[DistillBatch]) -> float:
    """Root of the mean squared difference of the two ways' log-probs, against their spread; AssertionError where it is
    no rounding. (In bf16 rounding may send a token to another expert, so single rows may differ by more.)
    """
    ours = torch.cat([answer.target_logprobs for answer in sweep.score(microbatches)])  # type: ignore[misc]
    theirs = torch.cat(plain.score(microbatches))
    relative = ((ours - theirs).pow(2).mean().sqrt() / theirs.std()).item()
    if not relative < AGREE or not theirs.std() > AGREE:
        raise AssertionError(f"the two ways' log-probs differ by {relative:.3f} of their spread, {theirs.std():.3f}")
    return relative


def expert_product(layer: Experts) -> Callable[[Tensor, int], Tensor]:
    """Rows and the number of an expert -> what this expert makes of them, by ``torch.mm``."""
    gate, up, down = layer.gate_proj, layer.up_proj, layer.down_proj

    def product(x: Tensor, e: int) -> Tensor:
        return torch.mm(silu(torch.mm(x, gate[e].t())) * torch.mm(x, up[e].t()), down[e].t())

    return product


def loop_over_experts(product: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The plain way: each expert that is hit takes its tokens, one after the other; its share is added to the sum."""

    def loop(hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        sum_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
        for expert in index_TK.unique().tolist():
            token, place = (index_TK == expert).nonzero(as_tuple=True)
            output = product(hidden_TH[token], expert)
            sum_TH.index_add_(0, token, output.float() * weight_TK[token, place, None])
        return sum_TH.to(hidden_TH.dtype)

    return loop


def read_rate() -> float:
    """Bytes per second that all threads read of memory, from a tensor that no cache holds."""
    numbers = torch.ones(2**27, dtype=torch.int64)
    (seconds,) = paired_seconds([numbers.sum], 5)
    return numbers.nbytes / seconds


@torch.no_grad()
def expert_figures(options: argparse.Namespace) -> dict[str, Any]:
    """The experts of one layer, against the roofline and a loop."""
    dtype, config = getattr(torch, options.dtype), read_json(options.config)
    torch.manual_seed(SEED)
    ours = Experts(config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]).to(dtype)
    for parameter in ours.parameters():
        parameter.uniform_(-SPREAD, SPREAD)
    gate, down, product = ours.gate_proj, ours.down_proj, expert_product(ours)
    hidden = torch.randn(options.expert_tokens, config["hidden_size"]).to(dtype)
    chosen = config["num_experts_per_tok"]
    index = torch.rand(options.expert_tokens, config["num_experts"]).topk(chosen, 1).indices
    arguments = hidden, index, torch.rand(options.expert_tokens, chosen)
    loop = loop_over_experts(product)
    wanted, found = ours(*arguments).float(), loop(*arguments).float()
    error = float((found - wanted).norm() / wanted.norm())
    if not error < (1e-5 if dtype == torch.float32 else 1e-2):
        raise AssertionError(f"grouped matmul and loop differ by {error}")
    rows = torch.randn(options.expert_tokens * chosen // len(gate), config["hidden_size"]).to(dtype)
    ways = [lambda: ours(*arguments), lambda: loop(*arguments), lambda: [product(rows, 0) for _ in gate]]
    seconds = paired_seconds(ways, options.expert_rounds)
    weights, flops = (
        sum(parameter.nbytes for parameter in ours.parameters()),
        6 * hidden.numel() * chosen * gate.shape[1],
    )
    limits = {"memory": weights / read_rate(), "matmul": flops / matmul_rate(dtype)}
    bound = max(limits, key=limits.__getitem__)
    return {
        "experts_share_of_roofline": limits[bound] / seconds[0],
        "experts_bound_by": bound,
        "experts_limits_seconds": limits,
        "experts_seconds": seconds[0],
        "experts_in_cache_seconds": seconds[2],
        "loop_seconds": seconds[1],
        "expert_tokens": options.expert_tokens,
        "expert_shape": {"experts": len(gate), "chosen": chosen, "hidden": down.shape[1], "width": gate.shape[1]},
        "expert_bytes": weights,
        "expert_flops": flops,
    }


def main(argv: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--folder", metavar="DIR", help="on the disk to read from (default: where temporary files go)")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", default=CONFIG, help="the teacher's widths (default: the 16B one's)"
    )
    parser.add_argument("--layers", type=int, default=2, help="layers, all with experts (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=19648, help="tokens (default: %(default)s, an eighth)")
    parser.add_argument("--micro-batches", type=int, default=8, help="in a step (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="in a micro-batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="teacher tokens of a sample (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each way (default: %(default)s)")
    parser.add_argument("--expert-tokens", type=int, default=1024, help="tokens for the experts (default: %(default)s)")
    parser.add_argument("--expert-rounds", type=int, default=9, help="timed rounds of each way (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the teacher")
    options = parser.parse_args(argv)
    common = {"dtype": options.dtype, "threads": torch.get_num_threads(), "rounds": options.rounds}
    experts = expert_figures(options)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="hosting-") as disk:
        figures = sweep_figures(options, Path(disk))
    destroy_distributed()
    report("hosting", {**figures, **experts, **common}, options.json)


if __name__ == "__main__":
    cli.run(main)
