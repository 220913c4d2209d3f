# torchrun --nproc-per-node 2 examples/row_parallel_linear.py
import torch

from sglang_symm.distributed import initialize_model_parallel

tp = initialize_model_parallel(2, enable_symm_mem=True).tp
torch.manual_seed(0)  # the same x [4, 64], weight [32, 64] and bias [32] on every rank
x, weight, bias = torch.randn(4, 64), torch.randn(32, 64), torch.randn(32)
x_r, weight_r = x.chunk(2, dim=1)[tp.rank_in_group].contiguous(), weight.chunk(2, dim=1)[tp.rank_in_group].contiguous()
y = torch.ops.sglang_symm.row_parallel_linear(x_r, weight_r, bias, tp.unique_name)
print(f"rank {tp.rank_in_group}: error {(y - x @ weight.T - bias).abs().max():.1e}, in the arena: {tp.contains(y)}")
tp.destroy()
