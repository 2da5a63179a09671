"""One of two ranks: VSF through the door for engines, over real exchanges between processes. Writes its two errors."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from test_engines import backend, dense, error, sample, shares  # noqa: E402

from vsf_core import TokenIndex, TokenLayout, attend_gathered, attend_spread  # noqa: E402


def gathered(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def passed_on(tensor):
    """What the rank before this one had."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    got = torch.empty_like(tensor)
    sent = dist.isend(tensor.contiguous(), (rank + 1) % ranks)
    dist.recv(got, (rank - 1) % ranks)
    sent.wait()
    return got


def main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    layout = TokenLayout(32, 9, 5)  # of text, 7 a rank
    q, k, v, terms = sample(layout, per_image=True)
    expected, tokens = dense(layout, q, k, v, terms), shares(layout)
    own = tokens[rank]
    index, mine = TokenIndex(layout, own), [t[:, :, own] for t in (q, k, v)]
    image, text = index.rows("I"), torch.cat([index.rows("N"), index.rows("P")])

    def ring(q, k, v, scale):
        z, lse = backend(q).with_lse(q, k, v)
        k, v = passed_on(k), passed_on(v)
        other, there = backend(q).with_lse(q, k, v)
        total = torch.logaddexp(lse, there)
        return z * torch.exp(lse - total)[..., None] + other * torch.exp(there - total)[..., None], total

    whole = [torch.cat(gathered(t[:, :, text]), dim=2) for t in mine[1:]]  # the text, in the sequence's order
    made = attend_spread(ring, backend(q), mine[0], mine[1][:, :, image], mine[2][:, :, image], *whole, index, terms)
    errors = [error(made, expected[:, :, own])]

    heads = slice(2 * rank, 2 * rank + 2)  # Ulysses: all tokens of some heads for some tokens of all heads
    given = [torch.cat(gathered(t), dim=2)[:, heads] for t in mine]
    everywhere = TokenIndex(layout, torch.cat(tokens))
    some = attend_gathered(backend(q), *given, everywhere, everywhere, terms)
    back = torch.cat(gathered(some), dim=1)[:, :, (len(own)) * rank :][:, :, : len(own)]
    errors.append(error(back, expected[:, :, own]))
    Path(folder, f"{rank}.txt").write_text("\n".join(map(str, errors)))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
