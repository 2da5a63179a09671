"""How many kernels a call launches beyond the model's own attention: on a GPU small pictures wait for nothing else."""

import pytest
import torch
from samples import backend_of, make
from torch.utils._python_dispatch import TorchDispatchMode

from vsf_core import NAG, NASA, ONG, VSF, NegativeTerms, TokenLayout, attend_cross, attend_joint, fused

ALLOCATIONS = ("aten::empty", "aten::new_empty")


class Launches(TorchDispatchMode):
    """The operators that compute something: neither views nor allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func.name().startswith(ALLOCATIONS):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "most"), [(VSF(), 12), (NASA(), 26), (NAG(0.25, 2.5), 38), (ONG(), 37)], ids=lambda v: str(v)[:4]
)
def test_joint_attention(method, most):
    layout = TokenLayout(256, 32, 16)
    q, k, v = make(layout, dtype=torch.bfloat16)
    terms, backend = NegativeTerms(torch.full((1, 1, 1), 3.3), torch.full((1, 1, 1), 0.2)), backend_of("merge", q)
    with torch.inference_mode(), Launches() as launches:
        attend_joint(method, backend, q, k, v, layout, terms)
    assert len(launches.names) - 1 == most, launches.names  # less the model's own


@pytest.mark.parametrize(
    ("method", "most"), [(VSF(), 8), (NASA(), 10), (NAG(0.25, 2.5), 22), (ONG(), 21)], ids=lambda v: str(v)[:4]
)
def test_cross_attention(method, most):
    q, k, v = (torch.randn(1, 2, n, 64, dtype=torch.bfloat16) for n in (256, 48, 48))
    terms, backend = NegativeTerms(torch.full((1, 1, 1), 3.3), torch.full((1, 1, 1), 0.2)), backend_of("merge", q)
    given = q, k[:, :, 16:], v[:, :, 16:], k[:, :, :16], v[:, :, :16]
    with torch.inference_mode(), Launches() as launches:
        attend_cross(method, backend, *given, terms)
    assert len(launches.names) - 1 == most, launches.names


@pytest.mark.parametrize("method", [VSF(), NASA()])
@pytest.mark.parametrize("cross", [False, True])
def test_the_fused_kernel_leaves_nothing_to_do(monkeypatch, method, cross):
    """But the formula of NAG, NASA and ONG."""

    def launch(q, *_arguments):
        return [torch.empty_like(q), torch.empty_like(q[:, :, -64:])][: 1 + _arguments[-2]]

    layout = TokenLayout(64, 32, 16)
    q, k, v = make(layout)
    terms, backend = NegativeTerms(torch.full((1, 1, 1), 3.3), torch.full((1, 1, 1), 0.2)), backend_of("fused", q)
    given = q[:, :, 48:], k[:, :, 16:], v[:, :, 16:], k[:, :, :16], v[:, :, :16]
    monkeypatch.setattr(fused, "_launch", launch)
    with torch.inference_mode(), Launches() as launches:
        if cross:
            attend_cross(method, backend, *given, terms)
        else:
            attend_joint(method, backend, q, k, v, layout, terms)
    assert len(launches.names) == (9 if isinstance(method, NASA) else 0), launches.names
