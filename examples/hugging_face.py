"""An unmodified Hugging Face Llama over the ranks: torchrun --nproc-per-node 2 examples/hugging_face.py [folder]

`tensor_parallelize` shards the loaded model in place; `generate` stays transformers' own. Without a folder: a small
random Llama. The tokens are compared with those of the whole model.
"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sglang_symm import destroy_model_parallel, initialize_model_parallel, tensor_parallelize


def load() -> torch.nn.Module:
    if len(sys.argv) > 1:
        return AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    torch.manual_seed(0)  # the same on every rank
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    dist.init_process_group("gloo")
    state = initialize_model_parallel(dist.get_world_size(), enable_symm_mem=True)
    model = load().eval()
    prompt = torch.arange(3, 11)[None]
    mask = torch.ones_like(prompt)

    def greedy() -> list[int]:
        with torch.inference_mode():
            y = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=16, pad_token_id=0)
        return y[0, prompt.shape[1] :].tolist()

    whole = greedy()
    tensor_parallelize(model, state)
    tokens = greedy()
    print(
        f"rank {dist.get_rank()}: tokens {tokens[:8]}..., as the whole model's: {tokens == whole}, "
        f"{state.tp.info()['calls']} calls of the group"
    )
    destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
