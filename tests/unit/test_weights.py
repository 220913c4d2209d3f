# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint: each rank reads its shards and no more, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llama_cases import EIGHT_HEADS, make_folder
from safetensors.torch import load_file, save_file
from thread_ranks import Layout, make_states
from torch import Tensor

from sglang_symm.models import LlamaConfig, LlamaForCausalLM, WeightError, load_weights, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("llama") / "model", attention_bias=True, mlp_bias=True)


def copy_of(folder: Path, target: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    target.mkdir()
    values = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(values))
    save_file(tensors, target / "model.safetensors")
    return target


def model_of(folder: Path, attn_tp: int = 1, rank: int = 0, **kwargs: object) -> LlamaForCausalLM:
    state = make_states(Layout(1, attn_tp))[rank]
    return LlamaForCausalLM(LlamaConfig.from_folder(folder), parallel_state=state, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_shards_of_all_ranks_are_the_whole(folder: Path, ranks: int) -> None:
    whole = load_file(folder / "model.safetensors")
    models = [model_of(folder, ranks, rank) for rank in range(ranks)]
    for model in models:
        load_weights(model, folder)
    layers = [model.model.layers[1] for model in models]
    name = "model.layers.1."
    rows = torch.cat([layer.self_attn.o_proj.weight for layer in layers], dim=1)
    assert torch.equal(rows, whole[name + "self_attn.o_proj.weight"])
    gates = torch.cat([layer.mlp.gate_up_proj.weight.chunk(2)[0] for layer in layers])
    ups = torch.cat([layer.mlp.gate_up_proj.bias.chunk(2)[1] for layer in layers])
    assert torch.equal(gates, whole[name + "mlp.gate_proj.weight"])
    assert torch.equal(ups, whole[name + "mlp.up_proj.bias"])
    assert torch.equal(
        torch.cat([model.model.embed_tokens.weight for model in models]), whole["model.embed_tokens.weight"]
    )
    assert torch.equal(torch.cat([model.lm_head.weight for model in models]), whole["lm_head.weight"])
    for layer in layers:  # a row-parallel bias and a norm are whole on every rank
        assert torch.equal(layer.mlp.down_proj.bias, whole[name + "mlp.down_proj.bias"])
        assert torch.equal(layer.input_layernorm.weight, whole[name + "input_layernorm.weight"])


def test_each_rank_reads_only_its_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    get = weights._Slice.__getitem__

    def counting(self: weights._Slice, index: tuple[slice, ...]) -> Tensor:
        nonlocal read
        part = get(self, index)
        read += part.numel()
        return part

    monkeypatch.setattr(weights._Slice, "__getitem__", counting)
    model = model_of(folder, attn_tp=4, rank=3)
    load_weights(model, folder)
    assert read == sum(parameter.numel() for parameter in model.parameters())
    whole = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert read < 0.27 * whole  # a quarter, norms and row-parallel biases


def test_a_sharded_checkpoint_is_read_through_its_index(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    split = copy_of(folder, tmp_path / "split", dict(list(tensors.items())[:5]))
    (split / "model.safetensors").rename(split / "a.safetensors")
    save_file(dict(list(tensors.items())[5:]), split / "b.safetensors")
    names = list(tensors)
    index = {"weight_map": {name: "a.safetensors" if i < 5 else "b.safetensors" for i, name in enumerate(names)}}
    (split / "model.safetensors.index.json").write_text(json.dumps(index))
    one, two = model_of(folder), model_of(split)
    load_weights(one, folder)
    load_weights(two, split)
    for expected, found in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(expected, found)
    (split / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"files that are not there: b\.safetensors"):
        load_weights(two, split)


def test_missing_extra_and_wrongly_shaped_weights_are_named(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(3, 5)
    tensors["model.norm.weight"] = torch.zeros(63)
    broken = copy_of(folder, tmp_path / "broken", tensors)
    model = model_of(folder, attn_tp=2, rank=1)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(WeightError) as error:
        load_weights(model, broken)
    text = str(error.value)
    assert text.startswith(f"3 weight(s) in {broken} do not fit the model:")
    assert "model.layers.0.self_attn.k_proj.weight: expected shape [32, 64], found no such weight" in text
    assert "model.layers.7.mlp.up_proj.weight: expected no such weight, found shape [3, 5]" in text
    assert "model.norm.weight: expected shape [64], found [63]" in text
    for was, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(was.nan_to_num(), parameter.nan_to_num())


def test_tied_embeddings_are_one_parameter_with_or_without_a_head_in_the_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("with", "without"):
        tied = copy_of(folder, tmp_path / name, tensors, tie_word_embeddings=True)
        model = model_of(tied, attn_tp=2, rank=1)
        load_weights(model, tied)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"][64:])
        tensors.pop("lm_head.weight", None)


def test_frequencies_in_old_checkpoints_are_no_weights(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    load_weights(model_of(folder), copy_of(folder, tmp_path / "old", tensors))


def test_weights_are_converted_to_the_model_s_dtype(folder: Path) -> None:
    model = model_of(folder, dtype=torch.bfloat16)
    load_weights(model, folder)
    expected = load_file(folder / "model.safetensors")["lm_head.weight"].bfloat16()
    assert torch.equal(model.lm_head.weight, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_weights_of_no_floating_dtype_are_refused(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    with pytest.raises(WeightError, match=r"lm_head.weight: expected a floating dtype, found (I32|BOOL)"):
        load_weights(model_of(folder), copy_of(folder, tmp_path / "ints", tensors))


def test_a_file_that_is_not_whole_is_named(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path / "broken", load_file(folder / "model.safetensors"))
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(WeightError, match=f"{file} is no whole safetensors file"):
        load_weights(model_of(folder), broken)
    for text in ("{", "{}", '{"weight_map": {"a": 1}}'):
        (broken / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=str(broken / "model.safetensors.index.json")):
            load_weights(model_of(folder), broken)


def test_a_folder_without_weights_is_an_error_that_names_it(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig.from_dict(EIGHT_HEADS), parallel_state=make_states(Layout(1, 1))[0])
    with pytest.raises(FileNotFoundError, match=rf"\*.safetensors files, found none in {tmp_path}"):
        load_weights(model, tmp_path)


def test_progress_is_shown_when_asked_for(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_weights(model_of(folder), folder)
    assert "loading weights" not in capfd.readouterr().err
    load_weights(model_of(folder), folder, progress=True)
    assert "loading weights: 100%" in capfd.readouterr().err
