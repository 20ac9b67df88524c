"""Time, width and soundness of spectral norms: ours, exact ones, and what people use.

    python scripts/benchmarks/spectral_norm.py
    python scripts/benchmarks/spectral_norm.py --kind dense --rounds 9 --output dense.json

One process, methods in turn, round after round; medians. "width" is (upper - lower)/lower for a bracket and
|value/exact - 1| for a single number. "sound" says whether what is offered as the norm, or as its upper bound, is at
least the exact norm of the stored weights (float64 SVD of the matrix, or of all matrices of the symbol on the grid, to
1e-14). Peers are left out where they are not installed (`pip install -e ".[benchmark]"`).
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import HfArgumentParser

from hf_lipschitz.functional import conv_spectral_norm_bound, spectral_norm_bound
from hf_lipschitz.functional.conv import symbol_grid
from hf_lipschitz.functional.geometry import ConvGeometry, conv_geometry, folded_kernel
from hf_lipschitz.functional.transfer import largest_transfer_norm, transfer_matrices


try:
    from deel.torchlip.normalizers import spectral_normalization
except ImportError:
    spectral_normalization = None
try:
    from orthogonium.layers.conv.singular_values import get_conv_sv
except ImportError:
    get_conv_sv = None

RTOL = 1e-3

DENSE = {
    "attention 768x768": (768, 768),
    "BERT, ViT up 3072x768": (3072, 768),
    "BERT, ViT down 768x3072": (768, 3072),
    "ViT head 1000x768": (1000, 768),
    "MiniLM attention 384x384": (384, 384),
    "MiniLM up 1536x384": (1536, 384),
}
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "ResNet-50 stem 7x7 /2": ((64, 3, 7, 7), {"stride": 2, "padding": 3}),
    "ResNet-50 3x3, 64": ((64, 64, 3, 3), {"padding": 1}),
    "ResNet-50 3x3, 128": ((128, 128, 3, 3), {"padding": 1}),
    "ResNet-50 3x3 /2, 128": ((128, 128, 3, 3), {"padding": 1, "stride": 2}),
    "ResNet-50 3x3, 256": ((256, 256, 3, 3), {"padding": 1}),
    "ResNet-50 3x3 /2, 256": ((256, 256, 3, 3), {"padding": 1, "stride": 2}),
    "ResNet-50 3x3, 512": ((512, 512, 3, 3), {"padding": 1}),
    "ResNet-50 1x1, 1024 to 2048": ((2048, 1024, 1, 1), {"stride": 2}),
    "ConvNeXt-T stem 4x4 /4": ((96, 3, 4, 4), {"stride": 4}),
    "ConvNeXt-T 7x7 depthwise, 96": ((96, 1, 7, 7), {"padding": 3, "groups": 96}),
    "ConvNeXt-T 7x7 depthwise, 768": ((768, 1, 7, 7), {"padding": 3, "groups": 768}),
    "ConvNeXt-T 2x2 /2, 192": ((192, 96, 2, 2), {"stride": 2}),
    "ConvNeXt-T 2x2 /2, 768": ((768, 384, 2, 2), {"stride": 2}),
}


@dataclass
class Arguments:
    kind: str = field(default="all", metadata={"help": "dense, convolutions or all"})
    rounds: int = field(default=7)
    slow_after: float = field(default=5.0, metadata={"help": "seconds after which a method gets one round"})
    threads: int = field(default=2)
    device: str = field(default="cpu")
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures"})


@dataclass
class Found:
    """What a method says: `upper` is offered as the norm or a bound of it."""

    upper: float
    lower: float | None = None


Method = Callable[[], Found]


def bracket(w: Tensor, **options: Any) -> Method:
    def run() -> Found:
        lower, upper = spectral_norm_bound(w, RTOL, **options)
        return Found(upper.item(), lower.item())

    return run


def number(function: Callable[[], Tensor]) -> Method:
    return lambda: Found(function().item())


def gram_eigenvalue(w: Tensor) -> Tensor:
    short = w if w.shape[-2] >= w.shape[-1] else w.mH
    return torch.linalg.eigvalsh(short.mH @ short)[..., -1].max().sqrt()


def torch_spectral_norm(w: Tensor, exact: float) -> Method:
    """torch's parametrization, as many power iterations as it takes to come within the width asked of the brackets."""

    def run() -> Found:
        torch.manual_seed(0)
        linear = nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device)
        linear.weight.data.copy_(w)
        nn.utils.parametrizations.spectral_norm(linear)
        estimator = linear.parametrizations.weight[0]
        value = 0.0
        for _ in range(500):
            if abs(value / exact - 1) <= RTOL:
                break
            estimator._power_method(w, 1)
            value = torch.vdot(estimator._u, w @ estimator._v).item()
        return Found(value)

    return run


def dense_methods(w: Tensor, exact: float) -> dict[str, Method]:
    double = w.double()
    found = {
        "ours, certified": bracket(w, certified=True),
        "ours, float32": bracket(w),
        "Gram iteration, certified": bracket(w, certified=True, method="gram"),
        "Gram iteration, float32": bracket(w, method="gram"),
        "SVD, float64": number(lambda: torch.linalg.matrix_norm(double, 2)),
        "SVD, float32": number(lambda: torch.linalg.matrix_norm(w, 2)),
        "eigvalsh of Gram, float64": number(lambda: gram_eigenvalue(double)),
        "eigvalsh of Gram, float32": number(lambda: gram_eigenvalue(w)),
        "torch spectral_norm": torch_spectral_norm(w, exact),
    }
    if spectral_normalization is not None:
        found["deel-torchlip"] = number(lambda: spectral_normalization(w, None)[2])
    return found


def symbol_norm(matrices: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrices).max()


def conv_methods(kernel: Tensor, geometry: ConvGeometry, options: dict[str, Any]) -> dict[str, Method]:
    """All on the same grid of frequencies, of which the exact norm is the reference."""
    folded = folded_kernel(kernel, geometry)
    grid = symbol_grid(folded.shape[3:])

    def ours(k: Tensor) -> Method:
        def run() -> Found:
            ends, _ = largest_transfer_norm(folded_kernel(k, geometry), grid, RTOL)
            return Found(ends.upper.item(), ends.lower.item())

        return run

    found = {
        "ours, certified": ours(kernel.double()),
        "ours, float32": ours(kernel),
        "SVD of the symbol, float64": number(lambda: symbol_norm(transfer_matrices(folded.double(), grid))),
        "SVD of the symbol, float32": number(lambda: symbol_norm(transfer_matrices(folded, grid))),
    }
    if kernel.dim() == 4:
        layer = nn.Conv2d(kernel.shape[1] * geometry.groups, kernel.shape[0], kernel.shape[2:], bias=False, **options)
        layer.weight.data = kernel
        nn.utils.parametrizations.spectral_norm(layer)
        estimator = layer.parametrizations.weight[0]
        flat = kernel.flatten(1)

        def torch_estimate() -> Found:
            estimator._power_method(flat, 1)
            return Found(torch.vdot(estimator._u, flat @ estimator._v).item())

        found["torch spectral_norm (flattened)"] = torch_estimate
        if get_conv_sv is not None:
            plain = nn.Conv2d(
                kernel.shape[1] * geometry.groups, kernel.shape[0], kernel.shape[2:], bias=False, **options
            )
            plain.weight.data = kernel
            found["orthogonium, 3 steps"] = number(lambda: get_conv_sv(plain, n_iter=3, return_stab_rank=False))
    return found


def measure(methods: dict[str, Method], exact: float, args: Arguments) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    results: dict[str, Found] = {}
    failed: dict[str, str] = {}
    for i in range(-1, args.rounds):
        for name, method in methods.items():
            if name in failed or (seconds[name] and seconds[name][0] > args.slow_after):
                continue
            start = time.perf_counter()
            try:
                results[name] = method()
            except (RuntimeError, ValueError) as error:
                failed[name] = str(error).splitlines()[0]
                continue
            if args.device == "cuda":
                torch.cuda.synchronize()
            taken = time.perf_counter() - start
            # The first round warms up, but for methods so slow that it does not matter.
            if i >= 0 or taken > args.slow_after:
                seconds[name].append(taken)
    rows = []
    for name in methods:
        if name in failed:
            rows.append({"method": name, "failed": failed[name]})
            continue
        value = results[name]
        width = abs(value.upper / exact - 1) if value.lower is None else value.upper / value.lower - 1
        rows.append(
            {
                "method": name,
                "seconds": statistics.median(seconds[name]),
                "width": width,
                "below_exact": max(0.0, 1 - value.upper / exact),
                "sound": value.upper >= exact * (1 - 1e-14),
            }
        )
    return rows


def show(console: Console, title: str, rows: list[dict[str, Any]], reference: str) -> None:
    by_name = {row["method"]: row for row in rows}
    table = Table(title=title)
    for column in ("method", "time", f"time / {reference}", "width", "sound"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        if "failed" in row:
            table.add_row(row["method"], "failed", "", "", row["failed"][:40])
            continue
        sound = "yes" if row["sound"] else f"no, {row['below_exact']:.1e} low"
        ratio = row["seconds"] / by_name[reference]["seconds"]
        table.add_row(row["method"], f"{1e3 * row['seconds']:.1f} ms", f"{ratio:.2f}", f"{row['width']:.1e}", sound)
    console.print(table)


def median_ratio(shapes: dict[str, list[dict[str, Any]]], method: str, reference: str) -> float:
    ratios = []
    for rows in shapes.values():
        by_name = {row["method"]: row for row in rows}
        ratios.append(by_name[method]["seconds"] / by_name[reference]["seconds"])
    return statistics.median(ratios)


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    console = Console()
    report: dict[str, Any] = {"arguments": vars(args), "torch": torch.__version__}
    if args.kind in ("dense", "all"):
        dense = report["dense"] = {}
        for name, shape in DENSE.items():
            torch.manual_seed(0)
            w = torch.randn(shape, device=args.device) / math.sqrt(shape[1])
            exact = torch.linalg.matrix_norm(w.double(), 2).item()
            dense[name] = measure(dense_methods(w, exact), exact, args)
            show(console, name, dense[name], "SVD, float64")
        for method in ("ours, certified", "ours, float32"):
            for reference in ("SVD, float64", "eigvalsh of Gram, float64", "SVD, float32"):
                ratio = median_ratio(dense, method, reference)
                console.print(f"dense, median over shapes: {method} takes {ratio:.2f} of {reference}")
    if args.kind in ("convolutions", "all"):
        convolutions = report["convolutions"] = {}
        for name, (shape, options) in CONVOLUTIONS.items():
            torch.manual_seed(0)
            kernel = torch.randn(shape, device=args.device) / math.sqrt(math.prod(shape[1:]))
            geometry = conv_geometry(shape, **options)
            folded = folded_kernel(kernel.double(), geometry)
            exact = symbol_norm(transfer_matrices(folded, symbol_grid(folded.shape[3:]))).item()
            convolutions[name] = measure(conv_methods(kernel, geometry, options), exact, args)
            show(console, name, convolutions[name], "SVD of the symbol, float64")
            slack = conv_spectral_norm_bound(kernel, rtol=RTOL, **options).item() / exact
            console.print(f"the size-free bound is {slack:.4f} times the largest norm on the grid")
        for method in ("ours, certified", "ours, float32"):
            for reference in ("SVD of the symbol, float64", "SVD of the symbol, float32"):
                ratio = 1 / median_ratio(convolutions, method, reference)
                console.print(
                    f"convolutions, median over shapes: {method} is {ratio:.1f} times as fast as {reference}"
                )
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
