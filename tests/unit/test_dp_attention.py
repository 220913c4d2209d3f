"""Padding modes, and gather and scatter over ranks that are played by plain tensors."""

from types import SimpleNamespace

import pytest
import torch

from sglang_symm.distributed.dp_attention import DpPaddingMode, ForwardBatch, dp_gather, dp_scatter
from sglang_symm.distributed.parallel_state import ParallelState

MAX_LEN, SUM_LEN = DpPaddingMode.MAX_LEN, DpPaddingMode.SUM_LEN


@pytest.mark.parametrize(
    ("counts", "is_extend", "mode"),
    [
        ([5], True, MAX_LEN),
        ([5], False, MAX_LEN),
        ([5, 5], True, SUM_LEN),
        ([5, 5], False, MAX_LEN),
        ([4, 0], False, MAX_LEN),  # 2 * 4 >= 4 * 2: just half of the rows are padding
        ([4, 0, 0], False, SUM_LEN),
        ([8, 1, 1, 5], False, SUM_LEN),  # 30 < 32
        ([8, 1, 1, 6], False, MAX_LEN),  # 32 >= 32
        ([0, 0], False, MAX_LEN),
    ],
)
def test_the_padding_mode_follows_from_the_batch(counts, is_extend, mode):
    assert ForwardBatch(counts, is_extend).mode is mode


@pytest.mark.parametrize("mode", list(DpPaddingMode))
def test_a_given_padding_mode_is_kept(mode):
    assert ForwardBatch([9, 0, 0], True, mode).mode is mode


@pytest.mark.parametrize(
    ("counts", "attn_tp", "expected"), [([5, 3], 2, 6), ([6, 3], 2, 6), ([0, 0], 4, 0), ([1, 0], 3, 3)]
)
def test_max_len_pads_to_the_longest_rounded_up_to_attention_tp(counts, attn_tp, expected):
    assert ForwardBatch(counts, False).padded_len(attn_tp) == expected


@pytest.mark.parametrize("counts", [[], [1, -1]])
def test_impossible_token_counts_are_refused(counts):
    with pytest.raises(ValueError, match="token count"):
        ForwardBatch(counts, False)


class PlayedGroup:
    """A group whose peers' contributions are known beforehand."""

    def __init__(self, rank, size):
        self.rank_in_group, self.world_size = rank, size
        self.device = torch.device("cpu")
        self.symmetric_memory_enabled = False
        self.sent = None

    def all_gather(self, x):
        self.sent = x
        raise Sent

    def all_reduce(self, x):
        self.sent = x
        raise Sent


class Sent(Exception):
    pass


def played_state(tp_rank, attn_tp, attn_dp):
    dp_rank, attn_tp_rank = divmod(tp_rank, attn_tp)
    tp = PlayedGroup(tp_rank, attn_tp * attn_dp)
    return ParallelState(tp, tp, PlayedGroup(attn_tp_rank, attn_tp), PlayedGroup(dp_rank, attn_dp))


def gathered(counts, attn_tp, mode, padded_input=False):
    """What dp_gather gives, from what every rank sends."""
    batch = ForwardBatch(counts, False, mode)
    parts, inputs = [], [torch.randn(count, 3) for count in counts]
    for tp_rank in range(attn_tp * len(counts)):
        state = played_state(tp_rank, attn_tp, len(counts))
        x = inputs[tp_rank // attn_tp]
        if padded_input:
            x = torch.cat([x, x.new_zeros(batch.padded_len(attn_tp) - len(x), 3)])
        with state.forward(batch), pytest.raises(Sent):
            dp_gather(x, state)
        parts.append(state.tp.sent)
    whole = torch.cat(parts) if mode is MAX_LEN else torch.stack(parts).sum(0)
    return batch, inputs, whole


@pytest.mark.parametrize("attn_tp", [1, 2, 3])
@pytest.mark.parametrize("counts", [[5, 3], [0, 4], [4, 0], [0, 0], [1, 7, 2], [1, 1]])
@pytest.mark.parametrize("mode", list(DpPaddingMode))
def test_scatter_gives_back_what_gather_took(counts, attn_tp, mode):
    batch, inputs, whole = gathered(counts, attn_tp, mode)
    assert len(whole) == batch.global_len(attn_tp)
    for tp_rank in range(attn_tp * len(counts)):
        state = played_state(tp_rank, attn_tp, len(counts))
        with state.forward(batch):
            assert torch.equal(dp_scatter(whole, state), inputs[tp_rank // attn_tp])


@pytest.mark.parametrize("counts", [[5, 3], [0, 4]])
def test_rows_that_are_padded_already_are_taken_as_they_are(counts):
    _, inputs, whole = gathered(counts, 2, MAX_LEN, padded_input=True)
    length = len(whole) // len(counts)
    for dp_rank, x in enumerate(inputs):
        assert torch.equal(whole[dp_rank * length : dp_rank * length + len(x)], x)


def test_in_sum_len_only_the_first_attention_tp_rank_sends_rows():
    batch = ForwardBatch([2, 2], False, SUM_LEN)
    state = played_state(1, 2, 2)
    with state.forward(batch), pytest.raises(Sent):
        dp_gather(torch.ones(2, 3), state)
    assert not state.tp.sent.any()


def test_one_dp_rank_needs_no_gather():
    state, x = played_state(1, 2, 1), torch.ones(3, 2)
    assert dp_gather(x, state) is x
    assert dp_scatter(x, state) is x


def test_a_wrong_number_of_rows_is_named():
    state = played_state(0, 2, 2)
    with state.forward(ForwardBatch([3, 2], False, MAX_LEN)):
        with pytest.raises(ValueError, match=r"3 or 4.*got \[2, 8\]"):
            dp_gather(torch.ones(2, 8), state)
        with pytest.raises(ValueError, match="expected 8 rows"):
            dp_scatter(torch.ones(5, 8), state)


def test_gather_outside_of_a_forward_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"state\.forward"):
        dp_gather(torch.ones(2, 8), played_state(0, 2, 2))


def test_a_forward_does_not_nest_and_ends_after_an_exception():
    state, batch = played_state(0, 1, 2), ForwardBatch([1, 1], False)
    with state.forward(batch), pytest.raises(RuntimeError, match="does not nest"), state.forward(batch):
        pass
    with pytest.raises(ZeroDivisionError), state.forward(batch):
        raise ZeroDivisionError
    assert state.forward_batch is None
    with state.forward(batch):
        assert state.forward_batch is batch


def test_a_forward_wants_a_count_for_each_dp_rank():
    state = played_state(0, 1, 2)
    with pytest.raises(ValueError, match=r"2 DP rank.*\[1, 2, 3\]"), state.forward(ForwardBatch([1, 2, 3], False)):
        pass


@pytest.mark.parametrize(("mode", "symmetric"), [(MAX_LEN, True), (SUM_LEN, False)])
def test_with_dp_attention_allocation_is_symmetric_only_in_a_forward_padded_to_the_maximum(mode, symmetric):
    state = played_state(0, 2, 2)
    assert state.enable_dp_attention
    assert not state.is_allocation_symmetric()
    with state.forward(ForwardBatch([3, 2], False, mode)):
        assert state.is_dp_max_padding() is symmetric
        assert state.is_allocation_symmetric() is symmetric
    assert not state.is_allocation_symmetric()


def test_without_dp_attention_allocation_is_always_symmetric():
    state = played_state(0, 2, 1)
    assert state.is_allocation_symmetric()
    with state.forward(ForwardBatch([3], True, SUM_LEN)):
        assert state.is_allocation_symmetric()


def test_token_counts_that_differ_inside_a_dp_rank_are_an_error():
    state = played_state(0, 2, 2)
    state.tp = SimpleNamespace(all_gather=lambda x: torch.tensor([3, 3, 4, 5]), device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"DP rank 1.*\[4, 5\]"):
        state.exchange_token_counts(3)
    state.tp.all_gather = lambda x: torch.tensor([3, 3, 4, 4])
    assert state.exchange_token_counts(3) == [3, 4]
