"""The door for engines: each rank's rows are those of the dense definition, for rings and for Ulysses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from samples import black_box

from vsf_core import (
    AttentionBackend,
    NegativeTerms,
    TokenIndex,
    TokenLayout,
    attend_gathered,
    attend_spread,
    joint_attention_reference,
    lse_attention,
)

RANKS = 2


def sample(layout, seed=0, batch=2, heads=4, per_image=False, padding=False):
    """q, k, v of the whole sequence, and how the image sees the negative."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, layout.keys, 16, generator=g) * 2 for _ in range(3))
    beta = 0.2 + torch.rand(batch, layout.image if per_image else 1, layout.negative if per_image else 1, generator=g)
    alpha = 3.3 + torch.rand(batch, layout.negative, 1, generator=g)
    hidden = None
    if padding:
        hidden = torch.zeros(batch, layout.negative, dtype=torch.bool)
        hidden[0, -1] = True
    return q, k, v, NegativeTerms(alpha, beta, hidden)


def dense(layout, q, k, v, terms):
    return joint_attention_reference(q, k, v, layout, terms.alpha, terms.beta, terms.padding)


def backend(q):
    return AttentionBackend(black_box, lse_attention(q.device, q.dtype, q.shape[-1]))


def shares(layout, ranks=RANKS):
    """Each rank's tokens: its part of the text, then its part of the picture, as engines cut them."""
    text = torch.arange(layout.keys - layout.image).chunk(ranks)
    image = torch.arange(layout.keys - layout.image, layout.keys).chunk(ranks)
    return [torch.cat(parts) for parts in zip(text, image, strict=True)]


def error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


CASES = pytest.mark.parametrize(
    ("layout", "options"),
    [
        (TokenLayout(30, 9, 5), {}),
        (TokenLayout(31, 8, 5), {"per_image": True}),
        (TokenLayout(30, 9, 5, before=4), {"padding": True}),
        (TokenLayout(30, 0, 6), {"per_image": True, "padding": True}),
    ],
    ids=["plain", "masks", "N inside P, padding", "no P"],
)


@CASES
def test_gathered_keys_in_an_engines_order(layout, options):
    """Each rank has its own queries and all keys, which stand as [t0 i0 t1 i1]."""
    q, k, v, terms = sample(layout, **options)
    expected, tokens = dense(layout, q, k, v, terms), shares(layout)
    order = torch.cat(tokens)
    for own in tokens:
        indices = TokenIndex(layout, own), TokenIndex(layout, order)
        made = attend_gathered(backend(q), q[:, :, own], k[:, :, order], v[:, :, order], *indices, terms)
        assert error(made, expected[:, :, own]) < 1e-5


@CASES
def test_a_ring_over_the_picture(layout, options):
    """Each rank calls the engine's attention once; text is whole on all of them."""
    q, k, v, terms = sample(layout, **options)
    expected, text = dense(layout, q, k, v, terms), layout.keys - layout.image
    image = torch.arange(text, layout.keys).chunk(RANKS)
    lse, calls = backend(q).with_lse, []

    def ring(q, k_own, v_own, scale):
        """Over the shards of all ranks, one after the other."""
        calls.append(k_own.shape[2])
        parts = [lse(q, k[:, :, at], v[:, :, at]) for at in image]
        total = torch.logsumexp(torch.stack([part for _, part in parts]), dim=0)
        return sum(z * torch.exp(part - total)[..., None] for z, part in parts), total

    for rank, own in enumerate(shares(layout)):
        given = q[:, :, own], k[:, :, image[rank]], v[:, :, image[rank]], k[:, :, :text], v[:, :, :text]
        made = attend_spread(ring, backend(q), *given, TokenIndex(layout, own), terms)
        assert error(made, expected[:, :, own]) < 1e-5
    assert calls == [len(at) for at in image]


def test_ulysses_order_read_as_that_of_the_model_is_another_attention():
    """The first trap: after Ulysses' exchange the tokens stand as [t0 i0 t1 i1]."""
    layout = TokenLayout(30, 9, 5)
    q, k, v, terms = sample(layout)
    order, expected = torch.cat(shares(layout)), dense(layout, q, k, v, terms)
    heads = slice(0, 2)  # of a rank
    given = [t[:, heads][:, :, order] for t in (q, k, v)]
    told, naive = TokenIndex(layout, order), TokenIndex(layout, torch.arange(layout.keys))
    assert error(attend_gathered(backend(q), *given, told, told, terms), expected[:, heads][:, :, order]) < 1e-5
    wrong = attend_gathered(backend(q), *given, naive, naive, terms)
    assert error(wrong, expected[:, heads][:, :, order]) > 0.1


def test_keys_that_every_rank_brings_count_once():
    """The second trap: all ranks bring P, one brings N."""
    layout = TokenLayout(30, 9, 5)
    q, k, v, terms = sample(layout)
    expected, tokens = dense(layout, q, k, v, terms), torch.arange(layout.keys)
    again = torch.cat([tokens, tokens[layout.span("P")]])
    told = TokenIndex(layout, tokens), TokenIndex(layout, again)
    assert error(attend_gathered(backend(q), q, k[:, :, again], v[:, :, again], *told, terms), expected) < 1e-5
    twice = TokenLayout(30, 18, 5)
    at = torch.cat([tokens[layout.span("N")], tokens[layout.span("P")].repeat(2), tokens[layout.span("I")]])
    wrong = joint_attention_reference(*(t[:, :, at] for t in (q, k, v)), twice, terms.alpha, terms.beta)
    assert error(wrong[:, :, twice.span("I")], expected[:, :, layout.span("I")]) > 0.1


def test_what_cannot_be_is_refused():
    layout = TokenLayout(6, 3, 2)
    q, k, v, terms = sample(layout)
    tokens = torch.arange(layout.keys)
    whole = TokenIndex(layout, tokens)
    with pytest.raises(ValueError, match="2 of 11 keys are missing, the first is 4"):
        attend_gathered(
            backend(q),
            q,
            k[:, :, :9],
            v[:, :, :9],
            whole,
            TokenIndex(layout, tokens[[*range(4), *range(6, 11)]]),
            terms,
        )
    with pytest.raises(ValueError, match="numbers from 0 to 10"):
        TokenIndex(layout, tokens + 1)
    with pytest.raises(ValueError, match="and keys of"):
        attend_gathered(backend(q), q, k, v, whole, TokenIndex(TokenLayout(7, 2, 2), tokens), terms)
    with pytest.raises(ValueError, match="5 tokens of text, got 4 keys"):
        attend_spread(None, backend(q), q, k[:, :, 5:], v[:, :, 5:], k[:, :, :4], v[:, :, :4], whole, terms)


def test_two_real_ranks(tmp_path):
    """Two processes (gloo): a ring that passes keys on, and Ulysses' exchange of heads for tokens."""
    script = Path(__file__).with_name("on_two_ranks.py")
    ranks = [subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)]) for rank in range(RANKS)]
    try:
        assert [rank.wait(120) for rank in ranks] == [0] * RANKS
    finally:
        for rank in ranks:
            rank.kill()
    for rank in range(RANKS):
        errors = [float(line) for line in (tmp_path / f"{rank}.txt").read_text().split()]
        assert len(errors) == 2 and max(errors) < 1e-5


def test_a_shape_of_an_engines_attention():
    """``F.scaled_dot_product_attention`` itself is a black box of this door's."""
    layout = TokenLayout(12, 4, 3)
    q, k, v, terms = sample(layout)
    index = TokenIndex(layout, torch.arange(layout.keys))
    made = attend_gathered(AttentionBackend(F.scaled_dot_product_attention), q, k, v, index, index, terms)
    assert error(made, dense(layout, q, k, v, terms)) < 1e-5
