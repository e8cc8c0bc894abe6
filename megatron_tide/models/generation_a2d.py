"""``model.generate`` for block diffusion language models, with transformers' argument names.

Copied into releases with ``decoding_a2d.py`` and ``sampling_a2d.py``: it needs only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation import GenerationMixin

from .decoding_a2d import BlockDecoder
from .sampling_a2d import DEFAULT_NEW_TOKENS, DecodingRule


class BlockGenerationMixin(GenerationMixin):  # type: ignore[misc]
    """Block decoding as a model's ``generate``; its defaults come from ``config`` and ``generation_config``."""

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: Any = None,
        *,
        inputs: torch.Tensor | None = None,
        seed: int | Sequence[int] = 0,
        streamer: Any = None,
        **options: Any,
    ) -> torch.Tensor:
        """Continue prompts by block decoding; int64 [B, P + longest answer], answers padded behind their end of text.

        Args:
            input_ids: [B, P] prompts, padded on either side (``attention_mask`` 0 marks padding); mask tokens in them
                are filled in. ``inputs`` is the same under transformers' name.
            seed: one number (row r uses seed + r), or one per row; used when ``temperature`` > 0.
            streamer: transformers' TextStreamer or the like, for one prompt: gets the prompt, then block after block.
            options: fields of ``DecodingRule`` (``max_new_tokens``, ``min_new_tokens``, ``eos_in_order``,
                ``tokens_per_step``, ``threshold``, ``temperature``, ``block_size``, ``mask_token_id``,
                ``pad_token_id``), ``eos_token_id``, ``do_sample``, and ``steps``: passes for the complete answer, in
                place of ``tokens_per_step``.
        """
        ids_BP = input_ids if input_ids is not None else inputs
        if ids_BP is None or ids_BP.dim() != 2:
            raise ValueError("generate: pass input_ids as a [batch, length] tensor")
        if streamer is not None and len(ids_BP) > 1:
            raise ValueError(f"generate: a streamer supports one prompt, not {len(ids_BP)}")
        rule = decoding_rule(self, generation_config or getattr(self, "generation_config", None), options)
        keep_BP = torch.ones_like(ids_BP) if attention_mask is None else attention_mask
        prompts = [ids[keep.bool()] for ids, keep in zip(ids_BP, keep_BP)]
        seeds = [seed + row for row in range(len(prompts))] if isinstance(seed, int) else list(seed)
        decoder = BlockDecoder(self, prompts, rule, seeds)
        _stream(decoder, streamer)
        answers = decoder.completions()
        filled_BP = ids_BP.clone()
        for row, prompt in enumerate(decoder.prompts()):
            filled_BP[row, keep_BP[row].bool()] = prompt
        new = ids_BP.new_full((len(answers), max(len(answer) for answer in answers)), rule.pad_token_id)
        for row, answer in enumerate(answers):
            new[row, : len(answer)] = answer
        return torch.cat((filled_BP, new), dim=1)


def _stream(decoder: BlockDecoder, streamer: Any) -> None:
    """Run to the end; pass the prompt and each finished block's new tokens to ``streamer`` (None: to none)."""
    sent = 0
    if streamer is not None:
        streamer.put(decoder.prompts()[0].cpu())
    for block_is_done in decoder.run():
        if streamer is not None and block_is_done:
            answer = decoder.completions(settled=True)[0].cpu()
            if len(answer) > sent:
                streamer.put(answer[sent:])
            sent = len(answer)
    if streamer is not None:
        streamer.end()


def decoding_rule(model: Any, defaults: Any, options: dict[str, Any]) -> DecodingRule:
    """The rule that ``options`` describe, completed from ``defaults`` (a generation config) and the model's config."""
    known = set(DecodingRule.__dataclass_fields__) | {"eos_token_id", "do_sample", "steps"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"generate: unknown argument {', '.join(unknown)}; use {', '.join(sorted(known))}")

    def find(name: str) -> Any:
        for source in (options.get(name), getattr(defaults, name, None), getattr(model.config, name, None)):
            if source is not None:
                return source
        return None

    eos = options.get("eos_token_ids", find("eos_token_id"))
    eos_ids = tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (int(eos),)
    pad = find("pad_token_id")
    pad = pad if pad is not None else (eos_ids[0] if eos_ids else None)
    values = {"block_size": find("block_size"), "mask_token_id": find("mask_token_id"), "pad_token_id": pad}
    for name, value in values.items():
        if value is None:
            raise ValueError(f"generate: the model's config has no {name}; pass {name}=...")
    # A temperature turns sampling on, and so does do_sample, as everywhere in transformers.
    sample = options.get("do_sample", bool(options.get("temperature")) or getattr(defaults, "do_sample", False))
    temperature = find("temperature") if sample else 0.0
    for name in DecodingRule.__dataclass_fields__.keys() - {*values, "eos_token_ids", "temperature"}:
        if find(name) is not None:
            values[name] = find(name)
    if options.get("steps") is not None:
        values["tokens_per_step"] = _tokens_per_step(options, values.get("max_new_tokens", DEFAULT_NEW_TOKENS))
    return DecodingRule(eos_token_ids=eos_ids, temperature=1.0 if temperature is None else temperature, **values)


def _tokens_per_step(options: dict[str, Any], max_new_tokens: int) -> int:
    """How many tokens each pass decides so that the answer takes about ``steps`` passes."""
    if options.get("tokens_per_step") is not None:
        raise ValueError("generate: steps and tokens_per_step exclude each other; use one of them")
    if options["steps"] < 1:
        raise ValueError(f"generate: steps is {options['steps']}; use 1 or more")
    return max(1, -(-max_new_tokens // options["steps"]))
