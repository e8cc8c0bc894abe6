"""The computation that the parity gate compares, and the fresh process that runs it on a release.

Run as a program by ``parity.py`` (``probe.py REQUEST ANSWERS``), copied to its own folder: the transformers loader
must not need this project. REQUEST is JSON; ANSWERS is a safetensors file with the result of ``run``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Encode = Callable[[list[dict[str, str]]], list[int]]
PASSES_PER_BLOCK = 8


@torch.no_grad()
def run(model: Any, prompts: list[list[int]], block: int, mask_id: int, **settings: Any) -> dict[str, torch.Tensor]:
    """For each prompt: its ids, the logits of it and of a block of masks after it, and a greedy answer of two blocks;
    and an answer without an end-of-text token, because a barely trained model ends at once.

    ``settings`` go to ``generate`` (none for a release: its own files have them).
    """
    answers: dict[str, torch.Tensor] = {}
    for number, prompt in enumerate(prompts):
        length = (len(prompt) // block + 1) * block
        ids = torch.tensor([prompt + [mask_id] * (length - len(prompt))])
        of_block = torch.arange(length) // block
        attend = (of_block.unsqueeze(1) >= of_block)[None, None]
        logits = model(ids, attention_mask=attend, position_ids=torch.arange(length).unsqueeze(0)).logits[0]
        answers |= {f"ids.{number}": torch.tensor(prompt), f"logits.{number}": logits}
        input_ids = torch.tensor([prompt])
        settings = {**settings, "max_new_tokens": 2 * block, "tokens_per_step": max(1, block // PASSES_PER_BLOCK)}
        answers[f"tokens.{number}"] = model.generate(input_ids, **settings)[0, len(prompt) :]
        answers[f"tokens.{number}.endless"] = model.generate(input_ids, **settings, eos_token_ids=())[0, len(prompt) :]
    return {name: tensor.contiguous() for name, tensor in answers.items()}


def own_memory(model: torch.nn.Module) -> None:
    """Copy each weight out of the mapped file: another memory alignment can change the order in which kernels sum."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def load_with_transformers(folder: str, dtype: torch.dtype, auto_map: dict[str, str]) -> tuple[Any, Encode]:
    """Load as a user does, with the project's code in the folder. Only the classes of ``auto_map`` are loaded:
    nothing else in the folder is trusted.
    """
    from transformers import AutoTokenizer
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if json.loads(Path(folder, "config.json").read_text()).get("auto_map") != auto_map:
        raise SystemExit("config.json names other code than the project's")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model_class = next(name for key, name in auto_map.items() if key.startswith("AutoModelFor"))
    found: Any = get_class_from_dynamic_module(model_class, folder, local_files_only=True)
    model = found.from_pretrained(folder, dtype=dtype).eval()

    def encode(messages: list[dict[str, str]]) -> list[int]:
        text = " ".join(message["content"] for message in messages)
        if tokenizer.chat_template is not None:
            text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if any(name.partition(".")[0] == "megatron_tide" for name in sys.modules):
        raise SystemExit("the release's code imports megatron_tide, which its users do not have")
    return model, encode


def load_with_package(folder: str, dtype: torch.dtype) -> tuple[Any, Encode]:
    """Load formats that have their code elsewhere."""
    from megatron_tide.bridge import load_tokenizer
    from megatron_tide.models import load_model

    return load_model(folder, dtype), encoder(load_tokenizer(folder))


def encoder(tokenizer: Any) -> Encode:
    """Messages -> prompt ids with a ``TextTokenizer``."""

    def encode(messages: list[dict[str, str]]) -> list[int]:
        text = " ".join(message["content"] for message in messages)
        if tokenizer.template_fingerprint is not None:
            text = tokenizer.render(messages, add_generation_prompt=True)
        return tokenizer.encode_prompt(text).tolist()

    return encode


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(request["threads"])
    folder, dtype, auto_map = request["folder"], getattr(torch, request["dtype"]), request["auto_map"]
    model, encode = load_with_transformers(folder, dtype, auto_map) if auto_map else load_with_package(folder, dtype)
    own_memory(model)
    prompts = [encode(messages) for messages in request["conversations"]]
    save_file(run(model, prompts, request["block"], request["mask_id"]), sys.argv[2])


if __name__ == "__main__":
    main()
