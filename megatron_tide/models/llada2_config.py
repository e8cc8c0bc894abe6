"""LLaDA2's configuration, as the public ``config.json`` spells it.

The public configuration class's defaults are placeholders of another model, so what decides a shape has no default
here: a file that lacks it is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# Keys that would change what is computed, and the only value that is: any other is refused instead of ignored.
_FIXED = {
    "use_bias": False,
    "use_qkv_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_scaling": None,
}


@dataclass(frozen=True, kw_only=True)
class LLaDA2Config:
    """Shapes and ids of a LLaDA2 model; ``extra`` holds the file's other keys, so that writing gives them back."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    moe_intermediate_size: int
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    partial_rotary_factor: float = 0.5
    rotary_dim: int | None = None
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    mask_token_id: int | None = None
    block_size: int = 32
    extra: dict[str, Any] = field(default_factory=dict)

    model_type = "llada2_moe"

    def __post_init__(self) -> None:
        for broken, rule in self._rules():
            if broken:
                raise ValueError(f"llada2_moe config: {rule}")

    def _rules(self) -> Iterator[tuple[bool, str]]:
        experts, groups, kept, chosen = self.num_experts, self.n_group, self.topk_group, self.num_experts_per_tok
        yield groups < 1 or experts % groups != 0, f"n_group {groups} must divide num_experts {experts}"
        inside = experts // groups
        yield inside < 2, f"a group's score needs two experts and n_group {groups} leaves {inside}: lower it"
        yield not 0 < kept <= groups, f"topk_group {kept} must be from 1 to n_group {groups}"
        reach = kept * inside
        yield not 0 < chosen <= reach, f"num_experts_per_tok {chosen} exceeds the {reach} experts of the kept groups"
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        yield heads % kv_heads != 0, f"num_key_value_heads {kv_heads} must divide num_attention_heads {heads}"
        size = self.rotary_size
        yield (
            size % 2 != 0 or not 0 < size <= self.head_dim,
            f"rotary size {size} must be even, within head_dim {self.head_dim}",
        )
        for name in ("hidden_size", "moe_intermediate_size"):
            # Grouped matmul wants rows that start on 16 bytes: 8 numbers of bf16.
            yield getattr(self, name) % 8 != 0, f"{name} {getattr(self, name)} must be a multiple of 8"

    @property
    def rotary_size(self) -> int:
        """How many of a head's dimensions are rotated."""
        return self.rotary_dim or int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LLaDA2Config:
        """Read the public ``config.json``'s dict. ValueError for a missing key or a variant that is not implemented."""
        values = dict(values)
        rope = values.pop("rope_parameters", None) or {}
        values.setdefault("rope_theta", rope.get("rope_theta"))
        if values.get("head_dim") is None and values.get("hidden_size") and values.get("num_attention_heads"):
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        for key, only in _FIXED.items():
            if values.get(key, only) != only:
                raise ValueError(f"llada2_moe config: {key} = {values[key]!r} is not implemented (only {only!r} is)")
        fields = {item.name: item for item in dataclasses.fields(cls) if item.name != "extra"}
        required = [name for name, item in fields.items() if item.default is dataclasses.MISSING]
        missing = [name for name in required if values.get(name) is None]
        if missing:
            raise ValueError(f"llada2_moe config lacks {', '.join(missing)}")
        known = {name: value for name, value in values.items() if name in fields}
        return cls(**known, extra={key: value for key, value in values.items() if key not in fields})

    def to_dict(self) -> dict[str, Any]:
        """The dict of ``config.json``, with the keys that :meth:`from_dict` did not know among them."""
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "extra"}
        if self.rotary_dim is None:
            del own["rotary_dim"]
        return {**_FIXED, **self.extra, **own, "model_type": self.model_type}
