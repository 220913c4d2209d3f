# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""What config.json may say, and what it may not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_symm.layers import RopeScaling
from sglang_symm.models import LlamaConfig

MINIMAL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}


def test_what_is_left_out_has_llama_s_defaults() -> None:
    config = LlamaConfig.from_dict(MINIMAL)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (8, 8, 10000.0)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)
    assert (config.rope_scaling, config.eos_token_ids) == (None, ())


def test_a_whole_config_is_read() -> None:
    config = LlamaConfig.from_dict(
        MINIMAL
        | {
            "model_type": "llama",
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "eos_token_id": [7, 9],
        }
        | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "max_position_embeddings": 4096}
        | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    )
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps) == (2, 16, 1e-5)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (True, True, True)
    assert (config.eos_token_ids, config.max_position_embeddings) == ((7, 9), 4096)
    assert (config.rope_theta, config.rope_scaling) == (5e5, RopeScaling("linear", 2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "expected model_type 'llama', found 'mamba'"),
        ({"hidden_act": "gelu"}, "expected hidden_act 'silu', found 'gelu'"),
        ({"vocab_size": None, "hidden_size": None}, "lacks vocab_size, hidden_size"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 does not divide by num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "expected rope_type .* found 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "expected partial_rotary_factor 1.0, found 0.5"),
        ({"hidden_size": "64"}, "expected hidden_size to be a positive whole number, found '64'"),
        ({"num_hidden_layers": 2.5}, "expected num_hidden_layers to be a positive whole number, found 2.5"),
        ({"num_attention_heads": 0}, "expected num_attention_heads to be a positive whole number, found 0"),
        ({"vocab_size": True}, "expected vocab_size to be a positive whole number, found True"),
        ({"rms_norm_eps": "1e-5"}, "expected rms_norm_eps to be a positive number, found '1e-5'"),
        ({"head_dim": 7}, "expected an even head_dim, .* found 7"),
        ({"num_attention_heads": 128}, "expected an even head_dim, .* found 0"),
        ({"rope_theta": -1.0}, "expected rope_theta to be a positive number, found -1.0"),
        ({"rope_scaling": [1]}, "expected rope_scaling to be an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' lacks factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3' lacks low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "expected factor to be a positive number, found '2'"),
        ({"eos_token_id": "</s>"}, "expected eos_token_id to be a whole number or a list of them"),
    ],
)
def test_what_cannot_be_run_is_an_error_that_says_so(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict(MINIMAL | change)


def test_a_folder_is_read_with_the_stop_tokens_of_its_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL | {"eos_token_id": 2}))
    assert LlamaConfig.from_folder(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert LlamaConfig.from_folder(tmp_path).eos_token_ids == (5, 6)


def test_a_folder_without_config_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"found none in {tmp_path}"):
        LlamaConfig.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_file_that_holds_no_json_object_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MINIMAL))
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=str(tmp_path / name)):
        LlamaConfig.from_folder(tmp_path)
