"""A stand-in for engines that spread a picture's tokens over GPUs: each block gets a rank's share of picture and text,
as in a forward pass of the engine's own, and what attention there gathers is gathered below ComfyUI's call of it.

Run as a program, it is one of two real ranks (gloo): it says what came of stock, of the spread model, and with VSF."""

import json
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

STREAMS = ("img", "txt")


def share_of(tensor, rank, ranks):
    """The tokens of a rank, of which all have as many: the last ones are repeated to fill up."""
    each = -(-tensor.shape[1] // ranks)
    at = torch.arange(rank * each, (rank + 1) * each).clamp(max=tensor.shape[1] - 1)
    return tensor[:, at], at


def spread(model, streams=STREAMS, rank=0, ranks=2, gather=None):
    """A clone whose blocks get a ``rank``'s share of the ``streams``; gather: puts all ranks' together again."""

    from comfy.patcher_extension import WrappersMP  # a program sets ComfyUI's options before it imports it

    def around(inner, args, extra):
        """As the forward pass that calls it, so outside of every block patch."""
        given, ends, start = dict(args), {}, 0
        at = []
        for stream in ("txt", "img"):  # as attention has them
            if args.get(stream) is None:
                continue
            length = args[stream].shape[1]
            own = torch.arange(length)
            if stream in streams:
                given[stream], own = share_of(args[stream], rank, ranks)
            at.append(own + start)
            ends[stream], start = length, start + length
        if args.get("pe") is not None:
            dim = next(d for d, size in enumerate(args["pe"].shape) if size == start)
            given["pe"] = args["pe"].index_select(dim, torch.cat(at))
        out = inner(given, extra) if inner is not None else extra["original_block"](given)
        return {**out, **{s: gather(out[s])[:, : ends[s]] for s in streams if gather and out.get(s) is not None}}

    def wrapper(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        network = executor.class_obj.diffusion_model
        dit = dict(options.get("patches_replace", {}).get("dit", {}))
        blocks = {"double_blocks": "double", "single_blocks": "single", "joint_blocks": "double"}
        for attribute, kind in {**blocks, "transformer_blocks": "double"}.items():
            for i in range(len(getattr(network, attribute, ()))):
                key = f"{kind}_block", i
                inner = dit.get(key)
                dit[key] = lambda args, extra, inner=inner: around(inner, args, extra)
        options = {**options, "patches_replace": {**options.get("patches_replace", {}), "dit": dit}}
        handles = []
        if hasattr(network, "layers"):  # Z-Image has no block patches
            handles = [network.layers[0].register_forward_pre_hook(first_layer)]
        try:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def first_layer(_, args):
        x, at = share_of(args[0], rank, ranks)
        return (x, args[1], args[2].index_select(next(d for d, s in enumerate(args[2].shape) if s > 8), at), *args[3:])

    m = model.clone()
    m.add_wrapper(WrappersMP.APPLY_MODEL, wrapper)
    return m


class Gathered(TorchFunctionMode):
    """Attention gathers the keys and values of all ranks: below ComfyUI's call of it, in PyTorch's own."""

    def __init__(self, gather):
        super().__init__()
        self.gather, self.calls = gather, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ == "scaled_dot_product_attention":
            self.calls += 1
            q, k, v, *rest = args
            with torch._C.DisableTorchFunction():
                k, v = (self.gather(t.transpose(1, 2).contiguous()).transpose(1, 2) for t in (k, v))
                return func(q, k, v, *rest, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def main(rank: int, folder: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest
    import torch.distributed as dist
    from cases import CASES, model_of
    from helpers import relative

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

    def gather(tensor):
        parts = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim=1)

    pack, found = conftest.load_pack(), {}
    for name in ("sd3", "flux"):
        case, model = CASES[name], model_of(name)
        run = {"steps": 1, "size": (16, 16)}
        positive = case.prompt(length=12)  # evenly shared, together with N too
        stock = case.run(model, positive, **run)
        with Gathered(gather) as mode:
            off = relative(case.run(spread(model, rank=rank, gather=gather), positive, **run), stock)
            attached = pack.negative(positive, negative=case.negative(4))
            try:
                case.run(spread(pack.patch(model), rank=rank, gather=gather), attached, **run)
                said = "nothing"
            except RuntimeError as error:
                said = str(error)
        found[name] = {"off": off, "gathered": mode.calls, "said": said}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
