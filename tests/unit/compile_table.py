"""Compiles the fused kernel's table for the architectures that are named, without such a chip, with all that a launch
may take (--all: for narrow heads and few queries, too). Prints [architecture, tiles, KiB of shared memory, bytes of
registers spilled] of every launch, for VSF and for what steers, as JSON. In a process of its own: the tests' Triton
interprets."""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vsf_core import fused
from vsf_core.fused_kernel import attention_kernel


def compile_for(chip, dim, tiles, two):
    """Tiles, shared memory in KiB, and bytes of registers spilled, of a launch as it is compiled for a chip."""
    tiles = fused.halved(tiles) if two else tiles
    constants = {"D": dim, "DIM": dim, "QUERIES": tiles[0], "KEYS": tiles[1], "NEGATIVES": 64, "OPERAND": tl.bfloat16}
    none = {"Share"} if two else {"OutN"}
    types = {name: "i32" for name in inspect.signature(attention_kernel.fn).parameters} | {"scale": "fp32"}
    types |= dict.fromkeys(("Q", "K", "V", "KN", "VN", "Out", "OutN"), "*bf16") | {"Alpha": "*fp32", "Beta": "*fp32"}
    types |= {"Mask": "*bf16", "MaskN": "*bf16", "Padding": "*i1", "Share": "*fp32"}
    types |= dict.fromkeys((*constants, *none), "constexpr")
    aligned = {"Q", "K", "V", "KN", "VN", "Out", "OutN"}
    at = [(i,) for i, name in enumerate(types) if name in aligned - none or re.fullmatch(r"\w+_(h|row|b)", name)]
    at = [place for place in at if not re.match("mask|padding|alpha|beta", list(types)[place[0]])]
    source = ASTSource(
        attention_kernel, types, constants | dict.fromkeys(none), {place: [["tt.divisibility", 16]] for place in at}
    )
    options = {"num_warps": tiles[2], "num_stages": tiles[3]}
    made = triton.compile(source, target=GPUTarget("cuda", chip[0] * 10 + chip[1], 32), options=options)
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    name = "ptxas-blackwell" if chip[0] >= 10 else "ptxas"
    arch = f"sm_{chip[0]}{chip[1]}{'a' if chip[0] >= 9 else ''}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        command = [str(assembler / name), "-v", "-arch", arch, file.name, "-o", os.devnull]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores", told)
    assert spilled is not None, told
    return tiles, made.metadata.shared / 1024, int(spilled[1])


if __name__ == "__main__":
    launches = [
        (chip, dim, tiles, two)
        for chip, dims in fused.TABLE.items()
        if f"{chip[0]}{chip[1]}" in sys.argv[1:]
        for dim, sizes in dims.items()
        for tiles in sizes.values()
        for two in (False, True)
        if "--all" in sys.argv or (dim, tiles) == (128, sizes[fused.ALWAYS])
    ]
    print(
        json.dumps([(f"{chip[0]}{chip[1]}", *compile_for(chip, dim, tiles, two)) for chip, dim, tiles, two in launches])
    )
