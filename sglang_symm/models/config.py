# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""A Llama's configuration, read from a Hugging Face folder without transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_symm.layers.rotary import RopeScaling


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers that make a Llama. Names as in Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_folder(cls, folder: str | Path) -> LlamaConfig:
        """From `config.json`, with the stop tokens of `generation_config.json` where there is one.

        Raises FileNotFoundError if the folder has no config.json, ValueError if this is no Llama that can be run."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"expected a Hugging Face model folder with a config.json, found none in {folder}")
        values = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        if generation.is_file():
            eos = read_json(generation).get("eos_token_id")
            values |= {} if eos is None else {"eos_token_id": eos}
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{error} (in {folder})") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlamaConfig:
        """From the contents of a config.json, of old (rope_theta, rope_scaling) or new (rope_parameters) transformers.

        Raises ValueError that names what is missing or what this Llama does not do."""
        _expect(values, "model_type", "llama", default="llama")
        _expect(values, "hidden_act", "silu", default="silu")
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [name for name in needed if values.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        for name in (*needed, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if values.get(name) is not None:
                _expect_number(values[name], name, int)
        _expect_number(values.get("rms_norm_eps", 1e-6), "rms_norm_eps")
        theta, scaling = _rope(values)
        heads = values["num_attention_heads"]
        kv_heads = values.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {heads} does not divide by num_key_value_heads {kv_heads}"
            )
        head_dim = values.get("head_dim") or values["hidden_size"] // heads
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"config.json: expected an even head_dim, which rotary embeddings turn, found {head_dim}")
        eos = values.get("eos_token_id")
        eos_token_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        if not all(type(token) is int for token in eos_token_ids):
            raise ValueError(
                f"config.json: expected eos_token_id to be a whole number or a list of them, found {eos!r}"
            )
        return cls(
            **{name: values[name] for name in needed},
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=values.get("max_position_embeddings") or 2048,
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            attention_bias=bool(values.get("attention_bias", False)),
            mlp_bias=bool(values.get("mlp_bias", False)),
            eos_token_ids=eos_token_ids,
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError that names the file when it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected {path} to hold a JSON object, found {type(values).__name__}")
    return values


def _expect_number(value: Any, name: str, kind: type[int | float] = float) -> None:
    if type(value) not in (int, kind) or not 0 < value < math.inf:
        what = "whole number" if kind is int else "number"
        raise ValueError(f"config.json: expected {name} to be a positive {what}, found {value!r}")


def _expect(values: Mapping[str, Any], key: str, expected: Any, default: Any) -> None:
    found = values.get(key, default)
    if found != expected:
        raise ValueError(f"config.json: expected {key} {expected!r}, found {found!r}")


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_parameters`, or from `rope_theta` and `rope_scaling`."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: expected rope_scaling to be an object, found {rope!r}")
    theta = rope.get("rope_theta") or values.get("rope_theta") or 10000.0
    _expect_number(theta, "rope_theta")
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise ValueError(f"config.json: expected partial_rotary_factor 1.0, found {partial}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    parameters = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
    if kind not in parameters:
        raise ValueError(f"config.json: expected rope_type default, linear or llama3, found {kind!r}")
    for name in parameters[kind]:
        if name not in rope:
            raise ValueError(f"config.json: rope_type {kind!r} lacks {name}")
        _expect_number(rope[name], name)
    if kind == "linear":
        return theta, RopeScaling(kind, rope["factor"])
    original = rope.get("original_max_position_embeddings") or values.get("max_position_embeddings") or 8192
    _expect_number(original, "original_max_position_embeddings")
    return theta, RopeScaling(kind, rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
