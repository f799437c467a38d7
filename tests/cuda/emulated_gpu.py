"""CUDA kernels compiled for an emulated GPU (tests/cuda/gpu): their own text, each piece of inline PTX a call."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
GPU = Path(__file__).parent / "gpu"
# Products and sums are not fused: some kernels are the same to the bit as their twins.
CHECKED = ("-O1", "-fsanitize=thread", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas")

FOUR, LAST_FOUR = r"\{%0, %1, %2, %3\}", r"\{%1, %2, %3, %4\}"
# What the PTX of one `asm` must be, and the function of namespace ptx that does it, with the operands in their order.
INSTRUCTIONS = {
    r"ld\.shared\.b32 %0, \[%1\];": "load",
    rf"ld\.shared\.v4\.b32 {FOUR}, \[%4\];": "load_four",
    rf"ld\.shared(::cluster)?\.v4\.f32 {FOUR}, \[%4\];": "load_four",
    r"st\.shared\.b32 \[%0\], %1;": "store",
    r"mapa\.shared::cluster\.u32 %0, %1, %2;": "map",
    r"st\.async\.shared::cluster\.mbarrier::complete_tx::bytes\.v4\.b32 \[%0\], \{%1, %2, %3, %4\}, \[%5\];": (
        "store_async"
    ),
    r"mbarrier\.init\.shared::cta\.b64 \[%0\], %1;": "make_barrier",
    r"mbarrier\.arrive\.shared::cta\.b64 _, \[%0\];": "arrive",
    r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[%0\], %1;": "expect",
    r"\{ \.reg \.pred done; wait: mbarrier\.try_wait\.parity\.shared::cta\.b64 done, \[%0\], %1; "
    r"@!done bra wait; \}": "wait",
    r"\{ \.reg \.pred done; wait: mbarrier\.try_wait\.parity\.relaxed\.cluster\.shared::cta\.b64 done, \[%0\], %1; "
    r"@!done bra wait; \} fence\.acquire\.sync_restrict::shared::cluster\.cluster;": "wait",
    r"fence\.release\.sync_restrict::shared::cta\.cluster; barrier\.cluster\.arrive\.relaxed\.aligned; "
    r"barrier\.cluster\.wait\.acquire\.aligned; fence\.acquire\.sync_restrict::shared::cluster\.cluster;": (
        "cluster_barrier"
    ),
    r"cp\.async\.cg\.shared\.global \[%0\], \[%1\], 16;": "copy_async",
    r"cp\.async\.commit_group;": "close_copies",
    r"cp\.async\.wait_group %0;": "wait_for_copies",
    rf"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 {FOUR}, \[%4\];": "matrices",
    rf"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16 {FOUR}, \[%4\];": "matrices_transposed",
    rf"stmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 \[%0\], {LAST_FOUR};": "store_four",
    rf"stmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16 \[%0\], {LAST_FOUR};": "store_four_transposed",
    r"cp\.async\.bulk\.tensor\.2d\.shared::cluster\.global\.mbarrier::complete_tx::bytes "
    r"\[%0\], \[%1, \{%2, %3\}\], \[%4\];": "load_box",
    r"cp\.async\.bulk\.tensor\.2d\.global\.shared::cta\.bulk_group \[%0, \{%1, %2\}\], \[%3\];": "store_box",
    r"fence\.proxy\.tensormap::generic\.acquire\.sys \[%0\], 128;": "see_map",
    r"cp\.async\.bulk\.commit_group;": "close_stores",
    r"cp\.async\.bulk\.wait_group\.read %0;": "wait_for_reads",
    r"bar\.sync %0, %1;": "meet_some",
    rf"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32 {FOUR}, "
    rf"\{{%4, %5, %6, %7\}}, \{{%8, %9\}}, {FOUR};": "multiply",
    r"wgmma\.fence\.sync\.aligned;": "fence_products",
    r"wgmma\.commit_group\.sync\.aligned;": "close_products",
    r"wgmma\.wait_group\.sync\.aligned 0;": "wait_for_products",
    r"fence\.proxy\.async\.shared::cta;": "fence_proxy",
    "": "nothing",
}
_KIND = r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16\.bf16|f16\.f16) "
HELD_PRODUCT = _KIND + r"\{([^}]*)\}, \{(.*)\}, (.*), 1, 1, 1, (.*);"
PRODUCT = _KIND + r"\{(.*)\}, (.*), 1, 1, 1, (.*);"


def call(inside: str) -> str:
    """What an `asm` statement is replaced by, given what is between its parentheses."""
    literal = r'"((?:[^"\\]|\\.)*)"'
    template = re.match(rf"(\s*{literal}\s*)*", inside)
    assert template is not None
    text = " ".join(re.findall(literal, template[0]))
    text = " ".join(text.replace("\\n", " ").split())
    operands = [match.end() for match in re.finditer(r'"[=+]?[rlfn]"\(', inside[template.end() :])]
    given = []
    for begin in operands:
        at, depth = template.end() + begin, 1
        end = at
        while depth:
            depth += {"(": 1, ")": -1}.get(inside[end], 0)
            end += 1
        given.append(inside[at : end - 1])
    held = re.fullmatch(HELD_PRODUCT, text)
    if held is not None:
        numbers = [f"%{i}" for i in range(int(held[1]) // 2 + 6)]
        assert [*held[3].split(", "), *held[4].split(", "), held[5], held[6]] == numbers
        sums, first = (", ".join(f"&({x})" for x in part) for part in (given[:-6], given[-6:-2]))
        return f"::ptx::held_product({{{sums}}}, {int(held[2] == 'f16.f16')}, {{{first}}}, {', '.join(given[-2:])})"
    product = re.fullmatch(PRODUCT, text)
    if product is not None:
        numbers = [f"%{i}" for i in range(int(product[1]) // 2 + 4)]
        assert [*product[3].split(", "), product[4], product[5]] == [
            *numbers[:-4], ", ".join(numbers[-4:-2]), ", ".join(numbers[-2:])
        ]  # fmt: skip
        half = int(product[2] == "f16.f16")
        return f"::ptx::product({{{', '.join(f'&({x})' for x in given[:-4])}}}, {half}, {', '.join(given[-4:])})"
    names = [name for pattern, name in INSTRUCTIONS.items() if re.fullmatch(pattern, text)]
    assert len(names) == 1, text
    return f"::ptx::{names[0]}({', '.join(given)})"


def translated(text: str) -> str:
    for pattern, instead in (
        (r"defined\(__CUDA_ARCH__\) && __CUDA_ARCH__ >= 900", "1"),
        (
            r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+) (\w+)\[\];",
            r"auto* \2 = reinterpret_cast<\1*>(emulated::dynamic_memory());",
        ),
        (
            r"__shared__ (\w+) (\w+)\[(.*)\];",
            r"auto* \2 = reinterpret_cast<\1*>(emulated::fixed_memory(sizeof(\1) * (\3)));",
        ),
        (r"__shared__ (\w+) (\w+);", r"auto& \2 = *reinterpret_cast<\1*>(emulated::fixed_memory(sizeof(\1)));"),
        (r"const __grid_constant__ (\w+) ", r"const \1& "),
        (r"(\w+)<<<([^,]*), ([^,]*), ([^,]*), stream>>>\(", r"emulated::launch(\2, 1, \3, \4, \1, "),
    ):
        text = re.sub(pattern, instead, text)
    assert not re.search("__shared__|<<<", text)
    out, at = "", 0
    for match in re.finditer(r"asm volatile\(", text):
        end, depth, quoted = match.end(), 1, False
        while depth:
            quoted ^= text[end] == '"'
            if not quoted:
                depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        out += text[at : match.start()] + call(text[match.end() : end - 1])
        at = end
    return out + text[at:]


def library(kernel: str | None, driver: str, folder: Path, change: Callable[[str], str] = str) -> ctypes.CDLL:
    """tests/cuda/gpu/`driver`.cpp, which may include csrc/cuda/`kernel`.cu, changed, and the GPU."""
    (folder / "cuda").mkdir()
    for file in (*((CUDA / f"{kernel}.cu",) if kernel else ()), *CUDA.glob("*.h")):
        name = file.name.replace(".cu", ".inc")
        text = file.read_text()
        (folder / "cuda" / name).write_text(translated(change(text) if file.stem == kernel else text))
    includes = [f"-I{path}" for path in (GPU, folder, ROOT / "csrc")]
    # glibc's checked longjmp takes a jump to another stack for an error; unique symbols would be shared by libraries.
    flags = ["-std=c++17", "-fPIC", "-fno-threadsafe-statics", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", *includes]
    objects = []
    # The sanitizer's calls are answered by machine.cpp, so nothing of it is linked.
    for name, more in ((driver, CHECKED), *((name, ("-O2",)) for name in ("machine", "instructions", "bulk"))):
        objects.append(folder / f"{name}.o")
        command = ["g++", *flags, *more, "-c", str(GPU / f"{name}.cpp"), "-o", str(objects[-1])]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
    target = folder / f"{driver}.so"
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(target)], check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.wrong.restype = ctypes.c_char_p
    return loaded


def aligned(tensor: Tensor) -> Tensor:
    room = torch.empty(tensor.numel() * tensor.element_size() + 16, dtype=torch.uint8)
    begin = -room.data_ptr() % 16
    return room[begin : begin + room.numel() - 16].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def basis(rows: int, rank: int, dtype: torch.dtype) -> Tensor:
    return aligned(torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64)).Q.to(dtype))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def sizes(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def near(out: Tensor, exact: Tensor, given: Tensor, expected: Tensor | None = None) -> bool:
    """Within the rounding of the result and 8e-6 of what was given: a coefficient in one part leaves 6e-4 of it.

    expected: in place of the exact result what is rounded, with coefficients in one part where they are meant to be.
    """
    rounding = ((exact if expected is None else expected).to(out.dtype).double() - exact).norm()
    return float((out.double() - exact).norm()) <= 1.02 * float(rounding) + 8e-6 * float(given.double().norm())


def spanned(left: Tensor | None, right: Tensor | None, m: int, n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A matrix of which next to nothing is left, so that errors are not lost in the rounding of what is."""
    grad = torch.zeros(m, n, dtype=torch.float64)
    if left is not None:
        grad += left.double() @ torch.randn(left.shape[1], n, dtype=torch.float64)
    if right is not None:
        grad += torch.randn(m, right.shape[1], dtype=torch.float64) @ right.double().mT
    return aligned(grad.to(dtype))
