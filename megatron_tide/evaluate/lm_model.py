"""Our models as lm-eval sees them: registered there as ``tide``. Importing this needs lm-eval."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from megatron_tide.data.progress import Progress
from megatron_tide.evaluate.asking import Asking, cut
from megatron_tide.evaluate.presets import Preset
from megatron_tide.evaluate.store import Store


@register_model("tide")
class TideLM(LM):
    """Generates; scores no given text, because a diffusion model has a bound in place of a likelihood."""

    def __init__(self, asking: Asking, preset: Preset, store: Store) -> None:
        super().__init__()
        self._asking, self._preset, self._store = asking, preset, store

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of the requests, task by task, each cut before the first string that ends it."""
        by_task: dict[tuple[str, int], list[int]] = defaultdict(list)
        seen: Counter[tuple[str, int, int]] = Counter()
        names = []
        for place, request in enumerate(requests):
            name = (request.task_name, request.doc_id, request.idx)
            draw, seen[name] = seen[name], seen[name] + 1
            names.append(f"{request.task_name}/{request.doc_id}.{request.idx}#{draw}")
            by_task[request.task_name, draw].append(place)
        progress, done, texts = Progress(len(requests), self._preset.task), 0, [""] * len(requests)
        for (_, draw), places in by_task.items():
            prompts = [(names[place], requests[place].args[0]) for place in places]
            answers = self._asking.ask(self._store, self._preset, prompts, progress, done, draw * len(places))
            for place, answer in zip(places, answers):
                until = requests[place].args[1].get("until", [])
                texts[place] = cut(answer.text, [until] if isinstance(until, str) else until)
            done += len(places)
        progress.close()
        return texts

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise ValueError(
            f"task {requests[0].task_name} compares likelihoods, which a diffusion model does not have; take a task "
            "that generates (output_type generate_until), or --tasks likelihood for the diffusion bound"
        )

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise ValueError(
            f"task {requests[0].task_name} measures perplexity, which a diffusion model does not have; --tasks "
            "likelihood measures its bound in bits per byte"
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model was trained on it, up to its answer or to where the last turn is begun for it."""
        tokenizer = self._asking.answerer.tokenizer
        if add_generation_prompt:
            return tokenizer.render(chat_history)
        # Templates differ in how they close an answer, so none is asked to. What begins with a space loses the one at
        # its end, as in transformers' continue_final_message.
        begun = chat_history[-1]["content"]
        return tokenizer.render(chat_history[:-1]) + (begun.rstrip() if begun[:1].isspace() else begun)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval calls caches of prompts after."""
        return self._asking.answerer.tokenizer.fingerprint
