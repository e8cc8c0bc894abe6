"""Text of an autoregressive model, token by token: the same calls as :mod:`megatron_tide.generate.complete`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList

from megatron_tide.bridge import TextTokenizer
from megatron_tide.generate.complete import UNFINISHED, Completion, Moment, Writer, batches_by_length, check_prompts
from megatron_tide.models.autoregressive import end_tokens, most_rows, only_numbers
from megatron_tide.models.sampling_a2d import DEFAULT_NEW_TOKENS

_BLOCKS_ONLY = ("eos_in_order", "tokens_per_step", "steps", "threshold", "least_confident_first")


def answers(
    model: Any,
    tokenizer: TextTokenizer,
    prompts: Sequence[np.ndarray | Sequence[int]],
    *,
    batch_size: int = 8,
    seed: int | Sequence[int] = 0,
    **options: Any,
) -> Iterator[dict[int, Completion]]:
    """As ``complete.answers``. ``options``: ``max_new_tokens``, ``min_new_tokens``, ``temperature``.

    Raises:
        ValueError: an empty prompt, or an option of block decoding.
    """
    check_prompts(model, prompts, batch_size)
    most, least, heat = _checked(model, options)
    ends = end_tokens(model, tokenizer.eos_id)
    size = 1 if heat else most_rows(model, batch_size)  # what is drawn must not depend on the batch
    for places in batches_by_length(prompts, size):
        rows = [[int(token) for token in prompts[place]] for place in places]
        width = max(map(len, rows))
        before = [width - len(row) for row in rows]
        ids = torch.tensor([[tokenizer.pad_id] * pad + row for pad, row in zip(before, rows)], device=model.device)
        seen = torch.tensor([[0] * pad + [1] * (width - pad) for pad in before], device=model.device)
        drawn = {"do_sample": True, "temperature": heat, "top_k": 0, "top_p": 1.0} if heat else {"do_sample": False}
        limits = {"max_new_tokens": most, "min_new_tokens": least, "eos_token_id": ends}
        rule = GenerationConfig(pad_token_id=tokenizer.pad_id, **limits, **drawn)  # in place of the checkpoint's own
        with torch.random.fork_rng():
            torch.manual_seed(seed + places[0] if isinstance(seed, int) else seed[places[0]])
            found = model.generate(
                ids, attention_mask=seen, generation_config=rule, logits_processor=LogitsProcessorList([only_numbers])
            )
        yield {
            place: _completion(tokenizer, row.tolist(), ends, prompt)
            for place, row, prompt in zip(places, found[:, width:], rows)
        }


def stream(
    model: Any, tokenizer: TextTokenizer, prompt: np.ndarray | Sequence[int], *, seed: int = 0, **options: Any
) -> Iterator[Moment]:
    """As ``complete.stream``: one token per pass, each decided at once."""
    check_prompts(model, [prompt])
    most, least, heat = _checked(model, options)
    ends, drawn, shown = end_tokens(model, tokenizer.eos_id), torch.Generator().manual_seed(seed), ""
    feed = torch.as_tensor(np.asarray(prompt), dtype=torch.int64, device=model.device).unsqueeze(0)
    cache, written, whole = None, list[int](), feed
    while len(written) < most and not (written and written[-1] in ends):
        with torch.inference_mode():
            found = model(input_ids=feed, past_key_values=cache, use_cache=True)
        cache, logits_V = (
            getattr(found, "past_key_values", None),
            only_numbers(feed, found.logits[0, -1].float().cpu().clone()),
        )
        if len(written) < least:
            logits_V[ends] = -torch.inf
        share = torch.softmax(logits_V / heat, 0) if heat else None
        written.append(int(logits_V.argmax() if share is None else torch.multinomial(share, 1, generator=drawn)))
        new = torch.tensor([[written[-1]]], device=model.device)
        whole = torch.cat((whole, new), 1)
        feed = whole if cache is None else new  # some have a state of another kind
        last = len(written) == most or written[-1] in ends
        text = tokenizer.decode(written)
        text = text if last else text.rstrip(UNFINISHED)
        yield Moment(list(written), [True] * len(written), text[len(shown) :])
        shown = text


def _checked(model: Any, options: dict[str, Any]) -> tuple[int, int, float]:
    """(maximum and minimum number of tokens, temperature); ValueError for what only block decoding knows."""
    used = [name for name in _BLOCKS_ONLY if options.get(name)]
    if options.get("block_layout", "sequence") != "sequence":
        used.append("block_layout")
    if used:
        raise ValueError(
            f"generate: a {model.config.model_type} model is autoregressive and writes token by token, so "
            f"--{used[0].replace('_', '-')} does not apply; leave it out"
        )
    most = options.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    if most < 1:
        raise ValueError(
            f"generate: a {model.config.model_type} model is autoregressive: it fills in no gaps (--infill), and "
            f"--max-new-tokens is {most}; use 1 or more"
        )
    return most, options.get("min_new_tokens", 0), options["temperature"]


def _completion(tokenizer: TextTokenizer, row: list[int], ends: Sequence[int], prompt: list[int]) -> Completion:
    end = next((place for place, token in enumerate(row) if token in ends), None)
    ids = row if end is None else row[: end + 1]
    return Completion(ids, tokenizer.decode(ids), end is not None, len(ids), prompt, len(ids))


IN_ORDER = Writer(answers, stream)
