"""``model.generate`` for block diffusion language models, with transformers' argument names.

Copied into releases with ``decoding_a2d.py`` and ``sampling_a2d.py``: it needs only torch and transformers.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .decoding_a2d import BlockDecoder
from .sampling_a2d import DEFAULT_NEW_TOKENS, DecodingRule

# Settings that are honoured, as keywords and as fields of a generation config.
_RULE = {*DecodingRule.__dataclass_fields__, "eos_token_id", "do_sample", "steps"}
_CALL = ("max_length", "num_return_sequences", "return_dict_in_generate", "stop_strings")
# Of each pair, what is stated last counts.
_SAME = (("max_new_tokens", "max_length"), ("tokens_per_step", "steps"))
# Values of other settings that ask for nothing, and settings that decide no token.
_NEUTRAL = {"num_beams": 1, "num_beam_groups": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "typical_p": 1.0}
_NEUTRAL |= {"min_p": 0.0, "no_repeat_ngram_size": 0, "min_length": 0}
_NO_EFFECT = {"bos_token_id", "decoder_start_token_id", "transformers_version", "use_cache"}


class BlockGenerationMixin(GenerationMixin):  # type: ignore[misc]
    """Block decoding as a model's ``generate``; its defaults come from ``config`` and ``generation_config``."""

    lm_head: Any

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        generation_config: Any = None,
        *,
        attention_mask: torch.Tensor | None = None,
        inputs: torch.Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        streamer: Any = None,
        stopping_criteria: Any = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Continue prompts by block decoding; int64 [B, P + longest answer], answers padded behind their end of text.

        Args:
            input_ids: [B, P] prompts, padded on either side (``attention_mask`` 0 marks padding; without one, pad
                tokens that not every row has there do); mask tokens in them are filled in. ``inputs`` is the same under
                transformers' name.
            generation_config: settings in place of the model's own; its fields mean what the same keywords mean
                (but in transformers 4 a field with its default, such as ``top_k`` 50, counts as not stated).
            seed: one number (row r uses seed + r), or one per row; used when tokens are sampled. None: drawn from
                ``generator``, or from torch's global one.
            streamer: transformers' TextStreamer or the like, for one prompt: gets the prompt, then block after block.
            stopping_criteria: called with the ids [B, P + n] for each n, as blocks finish; without scores (None).
            tokenizer: for ``stop_strings``.
            options: fields of ``DecodingRule``, ``eos_token_id``, ``do_sample``; ``steps``: passes for the complete
                answer, in place of ``tokens_per_step``; and transformers' ``max_length``, ``num_return_sequences``
                (rows of one prompt stand together), ``return_dict_in_generate``, ``stop_strings``.

        Raises:
            ValueError: a setting that block decoding does not have, or a value out of range.
        """
        _refuse_adapter(self)
        ids_BP = _prompt_ids(input_ids if input_ids is not None else inputs)
        settings = _settings(getattr(self, "generation_config", None), generation_config, options)
        call = {name: settings.pop(name, None) for name in _CALL}
        if call["max_length"] is not None:
            settings["max_new_tokens"] = _new_tokens(call["max_length"], ids_BP.shape[1])
        rule = decoding_rule(self, None, settings)
        keep_BP = _kept(ids_BP, rule) if attention_mask is None else _mask_of(ids_BP, attention_mask)
        times = 1 if call["num_return_sequences"] is None else call["num_return_sequences"]
        if not hasattr(times, "__index__") or times < 1:
            raise ValueError(f"generate: num_return_sequences is {times!r}; use a whole number, 1 or more")
        if times > 1:
            if not rule.temperature:
                raise ValueError(f"generate: {times} greedy answers are all the same; add do_sample=True")
            ids_BP, keep_BP = (one.repeat_interleave(times, 0) for one in (ids_BP, keep_BP))
        if streamer is not None and len(ids_BP) > 1:
            raise ValueError(f"generate: a streamer supports one prompt, not {len(ids_BP)}")
        prompts = [ids[keep] for ids, keep in zip(ids_BP, keep_BP)]
        decoder = BlockDecoder(self, prompts, rule, _seeds(seed, generator, rule, len(prompts)))
        batch = _Batch(decoder, ids_BP, keep_BP)
        batch.run(streamer, _stops(call["stop_strings"], tokenizer), stopping_criteria)
        sequences: Any = batch.sequences()
        return GenerateDecoderOnlyOutput(sequences=sequences) if call["return_dict_in_generate"] else sequences

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states: through the module, whose weight can be quantized."""
        return self.lm_head(hidden)

    def _prepare_generation_config(
        self, generation_config: Any, use_model_defaults: bool | None = None, **changes: Any
    ) -> tuple[Any, dict[str, Any]]:
        """For transformers 4's pipelines: the model's own settings come before those of a pipeline, which would sample.

        transformers 5 asks for nothing here and does the same.
        """
        own = copy.deepcopy(self.generation_config)
        if own.max_new_tokens is None:
            own.max_new_tokens = getattr(generation_config, "max_new_tokens", None)
        return own, own.update(**changes)


def _refuse_adapter(model: Any) -> None:
    """ValueError where PEFT wants to prepare the inputs of each pass, to put an adapter's own tokens before the prompt:
    block decoding prepares them itself, and would leave those out.
    """
    prepare = vars(model).get("prepare_inputs_for_generation")
    if getattr(prepare, "__self__", model) is not model:
        raise ValueError(
            "generate: the adapter has tokens before the prompt (prompt or prefix tuning), which block decoding does "
            "not read; use one that changes weights, such as LoRA or IA3"
        )


def _prompt_ids(given: Any) -> torch.Tensor:
    if not isinstance(given, torch.Tensor) or given.dim() != 2 or not len(given) or given.is_floating_point():
        raise ValueError(
            "generate: pass input_ids as a [batch, length] tensor, and what a tokenizer returns as generate(**inputs)"
        )
    return given.long()


def _mask_of(ids_BP: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.shape != ids_BP.shape:
        shapes = f"{list(mask.shape)}, input_ids have {list(ids_BP.shape)}"
        raise ValueError(f"generate: attention_mask has shape {shapes}; use the same, 0 where there is padding")
    return mask.bool()


def _kept(ids_BP: torch.Tensor, rule: DecodingRule) -> torch.Tensor:
    """Without an attention mask, what is no padding: pads at an end of a row that other rows have less of there."""
    place_P, width = torch.arange(ids_BP.shape[1], device=ids_BP.device), ids_BP.shape[1]
    pads_BP = (ids_BP == rule.pad_token_id).int()
    left_B1, right_B1 = (side.cumprod(1).sum(1, keepdim=True) for side in (pads_BP, pads_BP.flip(1)))
    padding_BP = (place_P < left_B1 - left_B1.min()) | (place_P >= width - right_B1 + right_B1.min())
    if rule.pad_token_id in rule.eos_token_ids and padding_BP.any():
        warnings.warn("generate: end of text at an end of prompts is taken for text; pass attention_mask", stacklevel=3)
        return torch.ones_like(padding_BP)
    return ~padding_BP


def _settings(own: Any, passed: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What the model's generation config, a passed one and keywords state; the later ones count."""
    found: dict[str, Any] = {}
    unclear = None  # a temperature of a config that may have stated do_sample=False, which transformers 4 does not tell
    given = {name: value for name, value in options.items() if value is not None}
    for layer in (_stated(own), _stated(passed, whole=True), given):
        for pair in _SAME:
            if any(name in layer for name in pair):
                found = {name: value for name, value in found.items() if name not in pair}
        if layer.get("max_new_tokens") is not None:
            layer.pop("max_length", None)
        # A temperature turns sampling on, and so does do_sample, as everywhere in transformers.
        if layer.get("temperature") and "do_sample" not in layer:
            unclear = layer["temperature"] if layer is not given and GenerationConfig().do_sample is False else None
            layer["do_sample"] = True
        elif "do_sample" in layer:
            unclear = None
        found |= layer
    if unclear is not None:
        raise ValueError(
            f"generate: a generation config has temperature {unclear} and not do_sample=True; state that as well, or "
            "leave out the temperature"
        )
    return found


def _stated(config: Any, whole: bool = False) -> dict[str, Any]:
    """Fields of a generation config that differ from its defaults; of others than transformers', those of the rule, or
    with ``whole`` all.
    """
    if config is None:
        return {}
    if not hasattr(config, "to_diff_dict"):
        raise ValueError(f"generate: generation_config is of type {type(config).__name__}; use a GenerationConfig")
    defaults = vars(GenerationConfig())
    values = {name: value for name, value in vars(config).items() if whole or name in defaults or name in _RULE}
    return {
        name: value
        for name, value in values.items()
        if value is not None and value != defaults.get(name) and not name.startswith("_")
    }


def _refuse_others(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        empty = value is None or value is False or (isinstance(value, (list, tuple, dict)) and not value)
        if name in _RULE or name in _NO_EFFECT or empty or _NEUTRAL.get(name) == value:
            continue
        known = ", ".join(sorted({*_RULE, *_CALL}))
        raise ValueError(f"generate: block decoding has no {name}; leave it out, or use one of {known}")


def _new_tokens(max_length: int, prompt: int) -> int:
    if max_length <= prompt:
        raise ValueError(f"generate: max_length is {max_length}, and the prompt has {prompt} tokens; use more")
    return max_length - prompt


def _seeds(
    seed: int | Sequence[int] | None, generator: torch.Generator | None, rule: DecodingRule, rows: int
) -> list[int]:
    """One seed per row; nothing is drawn where nothing is sampled."""
    if seed is None and rule.temperature > 0.0:
        device = "cpu" if generator is None else generator.device
        return torch.randint(2**62, (rows,), generator=generator, device=device).tolist()
    try:
        first = 0 if seed is None else operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        return [int(one) for one in seed]  # type: ignore[union-attr]
    return [first + row for row in range(rows)]


def _stops(strings: str | Sequence[str] | None, tokenizer: Any) -> Callable[[torch.Tensor], bool] | None:
    """Whether an answer (ids [n]) ends here; None where no string can end it."""
    strings = [strings] if isinstance(strings, str) else list(strings or ())
    if not all(isinstance(one, str) and one for one in strings):
        raise ValueError(f"generate: stop_strings are {strings!r}; use texts that are not empty")
    if strings and tokenizer is None:
        raise ValueError("generate: stop_strings need tokenizer=...")
    return (lambda answer: any(one in tokenizer.decode(answer.tolist()) for one in strings)) if strings else None


class _Batch:
    """The prompts as they came, and what ends answers to them or hears of them, block after block."""

    def __init__(self, decoder: BlockDecoder, ids_BP: torch.Tensor, keep_BP: torch.Tensor) -> None:
        self.decoder, self._ids_BP, self._keep_BP = decoder, ids_BP, keep_BP
        self._checked, self._steps = [0] * len(ids_BP), 0

    def run(self, streamer: Any, stops: Callable[[torch.Tensor], bool] | None, criteria: Any) -> None:
        """Run to the end; after each block, end answers, and pass new tokens to ``streamer``."""
        decoder, sent = self.decoder, 0
        criteria = [criteria] if callable(criteria) else list(criteria or ())
        if streamer is not None:
            streamer.put(decoder.prompts()[0].cpu())
        for block_is_done in decoder.run():
            if block_is_done and stops is not None:
                self._end_rows(stops)
            if block_is_done and criteria:
                self._end_by(criteria)
            if block_is_done and streamer is not None:
                answer = decoder.completions(settled=True)[0].cpu()
                if len(answer) > sent:
                    streamer.put(answer[sent:])
                sent = len(answer)
        if streamer is not None:
            streamer.end()

    def _end_rows(self, stops: Callable[[torch.Tensor], bool]) -> None:
        answers = self.decoder.completions(settled=True)
        for row in self.decoder.rows_A.tolist():
            ends = range(self._checked[row] + 1, len(answers[row]) + 1)
            end = next((n for n in ends if stops(answers[row][:n])), None)
            if end is not None:
                self.decoder.stop(row, end)
            self._checked[row] = len(answers[row])

    def _end_by(self, criteria: Sequence[Any]) -> None:
        """Ask as if all rows had written one token after the other; a row that is ahead waits for the others."""
        decoder, rule = self.decoder, self.decoder.rule
        answers = decoder.completions(settled=True)
        live = decoder.rows_A[decoder.live_A].tolist()
        going = [row for row in live if not self._ended(answers[row], rule)]
        most = min((len(answers[row]) for row in going), default=max(map(len, answers)))
        for length in range(self._steps + 1, most + 1):
            ids = self._with([answer[:length] for answer in answers], length)
            done_B = torch.zeros(len(ids), dtype=torch.bool)
            for one in criteria:
                done_B |= torch.as_tensor(one(ids, None)).bool().cpu()
            for row in done_B.nonzero()[:, 0].tolist():
                if len(answers[row]) >= length:
                    decoder.stop(row, length)
                    answers[row] = answers[row][:length]
        self._steps = max(self._steps, most)

    @staticmethod
    def _ended(answer: torch.Tensor, rule: DecodingRule) -> bool:
        return len(answer) >= rule.max_new_tokens or (len(answer) > 0 and int(answer[-1]) in rule.eos_token_ids)

    def sequences(self) -> torch.Tensor:
        """The prompts as they came, with their masks filled in, and the answers behind them."""
        answers = self.decoder.completions()
        return self._with(answers, max(map(len, answers)))

    def _with(self, answers: Sequence[torch.Tensor], length: int) -> torch.Tensor:
        filled_BP = self._ids_BP.clone()
        for row, prompt in enumerate(self.decoder.prompts()):
            filled_BP[row, self._keep_BP[row]] = prompt
        new = filled_BP.new_full((len(answers), length), self.decoder.rule.pad_token_id)
        for row, answer in enumerate(answers):
            new[row, : len(answer)] = answer
        return torch.cat((filled_BP, new), dim=1)


def decoding_rule(model: Any, defaults: Any, options: dict[str, Any]) -> DecodingRule:
    """The rule that ``options`` describe, completed from ``defaults`` (a generation config) and the model's config.

    Raises:
        ValueError: an option that is no part of the rule, or out of range.
    """
    settings = _settings(defaults, None, options)
    _refuse_others(settings)

    def find(name: str) -> Any:
        return settings[name] if settings.get(name) is not None else getattr(model.config, name, None)

    eos = settings.get("eos_token_ids", find("eos_token_id"))
    eos = eos.tolist() if isinstance(eos, torch.Tensor) else eos
    eos_ids = tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (int(eos),)
    pad = find("pad_token_id")
    pad = pad if pad is not None else (eos_ids[0] if eos_ids else None)
    values = {"block_size": find("block_size"), "mask_token_id": find("mask_token_id"), "pad_token_id": pad}
    for name, value in values.items():
        if value is None:
            raise ValueError(f"generate: the model's config has no {name}; pass {name}=...")
    drawn = ("temperature", "top_k", "top_p")  # transformers 4 gives every model's config values of these
    for name in DecodingRule.__dataclass_fields__.keys() - {*values, "eos_token_ids", *drawn}:
        if find(name) is not None:
            values[name] = find(name)
    if settings.get("do_sample", bool(settings.get("temperature"))):
        values |= {"temperature": 1.0} | {name: settings[name] for name in drawn if settings.get(name) is not None}
    if settings.get("steps") is not None:
        values["tokens_per_step"] = _tokens_per_step(settings, values.get("max_new_tokens", DEFAULT_NEW_TOKENS))
    return DecodingRule(eos_token_ids=eos_ids, **values)


def _tokens_per_step(settings: dict[str, Any], max_new_tokens: int) -> int:
    """How many tokens each pass decides so that the answer takes about ``steps`` passes."""
    if settings.get("tokens_per_step") is not None:
        raise ValueError("generate: steps and tokens_per_step exclude each other; use one of them")
    if settings["steps"] < 1:
        raise ValueError(f"generate: steps is {settings['steps']}; use 1 or more")
    return max(1, -(-max_new_tokens // settings["steps"]))
