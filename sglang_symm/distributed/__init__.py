# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Groups, the parallel state of a process, data-parallel attention, starting ranks."""

from sglang_symm.distributed.dp_attention import DpPaddingMode, ForwardBatch, dp_gather, dp_scatter
from sglang_symm.distributed.group import Group, GroupSettings, Rendezvous
from sglang_symm.distributed.launch import run_ranks, under_launcher
from sglang_symm.distributed.parallel_state import (
    ParallelState,
    destroy_model_parallel,
    get_attention_tp_group,
    get_parallel_state,
    get_tp_group,
    graph_capture,
    initialize_model_parallel,
    is_allocation_symmetric,
    model_parallel_is_initialized,
    use_symmetric_memory,
)
from sglang_symm.distributed.rendezvous import new_process_group

__all__ = [
    "DpPaddingMode",
    "ForwardBatch",
    "Group",
    "GroupSettings",
    "ParallelState",
    "Rendezvous",
    "destroy_model_parallel",
    "dp_gather",
    "dp_scatter",
    "get_attention_tp_group",
    "get_parallel_state",
    "get_tp_group",
    "graph_capture",
    "initialize_model_parallel",
    "is_allocation_symmetric",
    "model_parallel_is_initialized",
    "new_process_group",
    "run_ranks",
    "under_launcher",
    "use_symmetric_memory",
]
