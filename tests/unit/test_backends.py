"""The libraries' log-sum-exps. They run on CUDA alone: stand-ins with their interfaces, in torch."""

import math
import sys
from types import ModuleType

import pytest
import torch

from vsf_core import backends

CPU = torch.device("cpu")


def plain(q, k, v, scale):
    logits = torch.matmul(q, k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.matmul(logits.softmax(-1), v), logits.logsumexp(-1).float()


class Library:
    """``wrong``: what it does to the log-sum-exp that it should return."""

    def __init__(self, wrong=lambda lse: lse):
        self.wrong, self.rows = wrong, []

    def run(self, q, k, v, scale):
        self.rows.append(q.shape[2])
        z, lse = plain(q, k, v, scale)
        return z, self.wrong(lse)

    def sageattn(self, q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):
        assert return_lse and tensor_layout == "HND" and not is_causal
        return self.run(q, k, v, sm_scale)

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):
        assert return_attn_probs and not causal
        z, lse = self.run(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale)
        return z.transpose(1, 2), lse, None

    def memory_efficient_attention_forward_requires_grad(self, query, key, value, attn_bias=None, p=0.0, scale=None):
        z, lse = self.run(*(t.transpose(1, 2) for t in (query, key, value)), scale)
        return z.transpose(1, 2), torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)


@pytest.fixture
def install(monkeypatch):
    """Puts a stand-in where ``import`` finds it; what was found out about it is forgotten before and after."""

    def put(library):
        for path in ("sageattention", "flash_attn", "xformers", "xformers.ops", "xformers.ops.fmha"):
            module = ModuleType(path)
            for name in ("sageattn", "flash_attn_func", "memory_efficient_attention_forward_requires_grad"):
                setattr(module, name, getattr(library, name))
            monkeypatch.setitem(sys.modules, path, module)
        backends.lse_attention.cache_clear()
        return library

    yield put
    backends.lse_attention.cache_clear()


@pytest.mark.parametrize("name", backends.LIBRARIES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_large_calls_go_to_the_library_and_small_ones_to_torch(install, name, scale):
    library = install(Library())
    attend = backends.lse_attention(CPU, torch.float32, 64, name)
    assert attend is not None and attend.__name__ == name
    library.rows.clear()
    for rows, keys in ((300, 290), (300, 16), (16, 300)):
        q, k, v = (torch.randn(2, n, 3, 64).transpose(1, 2) for n in (rows, keys, keys))
        z, lse = attend(q, k, v, scale)
        expected, expected_lse = plain(q, k, v, scale)
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(lse, expected_lse)
    assert library.rows == [300]


@pytest.mark.parametrize("name", backends.LIBRARIES)
@pytest.mark.parametrize(
    "wrong",
    [lambda lse: lse / math.log(2), lambda lse: lse + 0.3, lambda lse: lse.transpose(1, 2), lambda lse: lse * math.nan],
    ids=["base 2", "shifted", "other layout", "nan"],
)
def test_a_wrong_log_sum_exp_is_not_used(install, name, wrong):
    install(Library(wrong))
    assert backends.lse_attention(CPU, torch.float32, 64, name) is None


@pytest.mark.parametrize("name", backends.LIBRARIES)
def test_a_library_that_is_not_there(name):
    backends.lse_attention.cache_clear()
    assert name not in sys.modules
    assert backends.lse_attention(CPU, torch.float32, 64, name) is None
