"""The judge itself is judged: what must fail does, and ties and allowances pass."""

import pytest
import torch

from dinofast.ops.registry import OPS, Kernel
from dinofast.testing import assert_kernel, cast_inputs

OP = OPS["cosine_max"]
ARGS = (torch.randn(20, 7, generator=torch.Generator().manual_seed(1)), torch.eye(7))


def judge(change, args=ARGS):
    def run(*args):
        similarity, index = OP.reference(*args)
        return change(similarity.clone(), index.clone())

    assert_kernel(OP, Kernel("cpu", ("cpu",), run), args)


def test_the_reference_passes():
    judge(lambda s, i: (s, i))


def test_an_error_within_the_allowance_passes_and_beyond_it_fails():
    judge(lambda s, i: (s + 5e-7, i))
    with pytest.raises(AssertionError, match="errs by"):
        judge(lambda s, i: (s + 1e-5, i))


def test_a_lost_nan_fails():
    broken = (ARGS[0].clone(), ARGS[1])
    broken[0][3] = torch.nan
    judge(lambda s, i: (s, i), broken)
    with pytest.raises(AssertionError, match="NaN or inf differ at"):
        judge(lambda s, i: (s.nan_to_num(1.0), i), broken)


def test_an_invented_nan_fails():
    def poison(similarity, index):
        similarity[5] = torch.nan
        return similarity, index

    with pytest.raises(AssertionError, match="NaN or inf differ at"):
        judge(poison)


def test_a_wrong_index_fails_and_a_tied_one_passes():
    with pytest.raises(AssertionError, match="misses the best"):
        judge(lambda s, i: (s, (i + 1) % 7))
    tied = (ARGS[0], torch.cat([ARGS[1], ARGS[1]]))
    judge(lambda s, i: (s, (i + 7) % 14), tied)


def test_an_index_out_of_range_fails():
    with pytest.raises(AssertionError, match="outside"):
        judge(lambda s, i: (s, i + 7))


def test_wrong_shape_and_dtype_fail():
    with pytest.raises(AssertionError, match="has shape"):
        judge(lambda s, i: (s[:-1], i))
    with pytest.raises(AssertionError, match=r"expected torch\.float32"):
        judge(lambda s, i: (s.double(), i))


def test_low_precision_is_measured_against_torch_in_the_same_dtype():
    args = cast_inputs(OP, ARGS, torch.bfloat16)
    judge(lambda s, i: (s, i), args)
    with pytest.raises(AssertionError, match="errs by"):
        judge(lambda s, i: (s + 0.05, i), args)
