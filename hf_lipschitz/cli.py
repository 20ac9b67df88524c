"""The command line: hf-lipschitz demo | inspect | bound | certify | merge | report."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler


app = typer.Typer(
    help="Lipschitz constraints, training and certificates for Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(width=None if sys.stdout.isatty() else 118)
errors = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Hub id or local directory of a model.")]


class ActName(StrEnum):
    """Acts of the demo."""

    text = "text"
    vision = "vision"
    both = "both"


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        errors.print(f"[red]error:[/red] {' '.join(str(error).split())}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@app.callback()
def _setup(verbose: Annotated[bool, typer.Option("--verbose", help="Log what the libraries do.")] = False) -> None:
    from transformers.utils import logging as transformers_logging

    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=errors, show_path=False)])
    if not verbose:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


@app.command()
def demo(
    act: Annotated[
        ActName, typer.Option(help="Which act; with --model or --dataset it follows from them.")
    ] = ActName.both,
    model: Annotated[str | None, typer.Option(help="Hub id or directory, in the place of the act's model.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id or directory, in the place of the act's data.")] = None,
    output: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("hf_lipschitz_demo"),
    max_steps: Annotated[int, typer.Option(help="Training steps; -1 keeps the act's epochs.")] = -1,
    certify: Annotated[int | None, typer.Option(help="How many held-out inputs to certify.")] = None,
    seed: int = 0,
) -> None:
    """Constrains a model, trains it, saves and reloads it and certifies held-out inputs, on real text and images."""
    import dataclasses

    from hf_lipschitz.demo import run_act, text_act, vision_act
    from hf_lipschitz.demo.data import load, mnist, tweets
    from hf_lipschitz.demo.models import modality_of

    with _one_line_errors():
        data = None if dataset is None else load(dataset)
        modality = data.modality if data is not None else None if model is None else modality_of(model)
        chosen = (
            [modality] if modality else ["text", "image"] if act == "both" else [{"vision": "image"}.get(act, act)]
        )
        if model is not None and data is not None and modality_of(model) != modality:
            raise ValueError(
                f"{model} takes {modality_of(model)}s and {dataset} holds {modality}s; choose a pair that fits"
            )
        steps = {} if max_steps < 0 else {"max_steps": max_steps}
        for name in chosen:
            build, default = (vision_act, mnist) if name == "image" else (text_act, tweets)
            plan = build(data or default(), model, **steps)
            if certify is not None:
                plan = dataclasses.replace(plan, certify=certify)
            run_act(plan, output, console, command=shlex.join(["hf-lipschitz", *sys.argv[1:]]), seed=seed)


@app.command(name="inspect")
def inspect_command(model: Model) -> None:
    """Prints the norm of every weight layer of a classifier or encoder, and what no layer's bound covers."""
    with _one_line_errors():
        from hf_lipschitz import inspect

        console.print(inspect(_load(model)))


@app.command()
def bound(
    model: Model,
    text: Annotated[str | None, typer.Option(help="A text, whose number of tokens the bound is for.")] = None,
    image: Annotated[Path | None, typer.Option(help="An image; the bound is then with respect to its pixels.")] = None,
    radius: Annotated[float | None, typer.Option(help="For a bound on the ball of this radius around it.")] = None,
    steps: Annotated[int, typer.Option(help="Of the attack that finds the lower bound; 0 leaves it out.")] = 20,
    starts: Annotated[int, typer.Option(help="Inputs from which the attack climbs.")] = 8,
    seed: int = 0,
) -> None:
    """Prints a sound upper bound of the Lipschitz constant of a whole model, what it is made of, and a lower bound.

    Without a text or an image the inputs are random, made from the model's configuration.
    """
    with _one_line_errors():
        from hf_lipschitz import lipschitz_bound, verify_lipschitz

        loaded = _load(model).eval()
        inputs, options = _example(model, loaded, text, image)
        options["radius"] = radius
        upper = lipschitz_bound(loaded, inputs, **options)
        console.print(upper)
        if steps > 0:
            lower = verify_lipschitz(loaded, inputs, **options, starts=starts, steps=steps, seed=seed)
            ratio = f", a ratio of {upper.value / lower:.3g}" if lower > 0 and upper.value < float("inf") else ""
            console.print(f"an attack reached {lower:.4g}{ratio}", highlight=False)


@app.command()
def merge(model: Model, output: Annotated[Path, typer.Argument(help="Directory of the plain model.")]) -> None:
    """Writes a plain copy of a constrained model, which loads without this library."""
    with _one_line_errors():
        from transformers import AutoImageProcessor, AutoTokenizer

        import hf_lipschitz

        plain = hf_lipschitz.merge(_load(model))
        plain.save_pretrained(output)
        for auto in (AutoTokenizer, AutoImageProcessor):
            try:
                auto.from_pretrained(model).save_pretrained(output)
            except (ImportError, OSError, ValueError):
                continue
        console.print(f"plain {type(plain).__name__} written to {output}")


@app.command()
def certify(
    model: Model,
    dataset: Annotated[str, typer.Argument(help="Hub id or local directory of labelled texts or images.")],
    sigma: Annotated[
        float, typer.Option(help="Noise, in the unit of the input: pixels in [0, 1], or embeddings; 0: deterministic.")
    ] = 0.0,
    output: Annotated[Path, typer.Option(help="JSON lines file; an interrupted run goes on where it was.")] = Path(
        "results.jsonl"
    ),
    n0: Annotated[int, typer.Option(help="Samples that choose the class.")] = 100,
    n: Annotated[
        int, typer.Option(help="Samples that bound its probability; with --radii the most of them.")
    ] = 10_000,
    radii: Annotated[
        list[float] | None, typer.Option(help="Sample only until it is decided which of these are certified.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Probability that one certificate is wrong.")] = 1e-3,
    certificate: Annotated[
        str, typer.Option(help="two_class, one_class, class_partition, lvm, lipschitz or deterministic.")
    ] = "two_class",
    noise: Annotated[str, typer.Option(help="gaussian, exact, laplace or uniform.")] = "gaussian",
    batch_size: Annotated[int, typer.Option(help="Noisy copies a forward pass.")] = 100,
    limit: Annotated[int | None, typer.Option(help="Certify the first so many held-out inputs.")] = None,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Certifies the held-out split of a data set and prints the certified accuracy.

    Under `torchrun --no-python -- hf-lipschitz certify ...` the work is shared by all processes.
    """
    with _one_line_errors():
        import torch
        from accelerate import Accelerator
        from transformers import pipeline

        from hf_lipschitz import SmoothingConfig
        from hf_lipschitz.dataset_certification import certify_dataset
        from hf_lipschitz.demo.data import load
        from hf_lipschitz.summary import summarize

        config = SmoothingConfig(
            sigma=sigma,
            n0=n0,
            n=n,
            alpha=alpha,
            certificate=certificate,
            noise=noise,
            radii=sorted(radii) if radii else None,
            batch_size=batch_size,
            seed=seed,
        )
        data = load(dataset)
        where, is_main, accelerator = {"device": device}, True, None
        if torch.distributed.is_torchelastic_launched():
            accelerator = Accelerator(cpu=torch.device(device).type == "cpu")
            where, is_main = {"accelerator": accelerator}, accelerator.is_main_process
        certifier = pipeline("certified-classification", model=model, smoothing=config, **where)
        held_out = data.test if limit is None else data.test.select(range(min(limit, len(data.test))))
        labels = [int(label) for label in held_out["labels"]]
        certificates = certify_dataset(certifier, list(held_out["input"]), labels, output, details={"data": data.name})
        if is_main:
            console.print(summarize(certificates, labels))
            console.print(f"written to {output}")
        if accelerator is not None:
            # Left to the end of the interpreter, threads of gloo may abort it.
            accelerator.wait_for_everyone()
            accelerator.state.destroy_process_group()


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A results.jsonl.")],
    curve: Annotated[Path | None, typer.Option(help="Image of the certified-accuracy curve to write.")] = None,
) -> None:
    """Prints the certified accuracy of a results file, and draws its curve."""
    with _one_line_errors():
        from hf_lipschitz.certification import read_results
        from hf_lipschitz.plots import certified_accuracy_curve
        from hf_lipschitz.summary import summarize

        found = read_results(results)
        if not found.certificates:
            raise ValueError(f"{results} holds no certificate yet; run hf-lipschitz certify to the end")
        labels = [found.config["labels"][certificate.index] for certificate in found.certificates]
        console.print(summarize(found.certificates, labels))
        if curve is not None:
            certified_accuracy_curve(found.certificates, labels, curve)
            console.print(f"curve written to {curve}")


def _example(name: str, model: Any, text: str | None, image: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs for `forward`, and what else a bound needs to know of them."""
    from hf_lipschitz.probes import probe_inputs

    if text is not None and image is not None:
        raise ValueError("give a text or an image, not both")
    if text is not None:
        from transformers import AutoTokenizer

        return dict(AutoTokenizer.from_pretrained(name)(text, return_tensors="pt", truncation=True)), {}
    if image is not None:
        import numpy as np
        import torch
        from PIL import Image
        from transformers import AutoImageProcessor

        mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
        pixels = np.asarray(Image.open(image).convert(mode), dtype=np.float32) / 255
        stack = torch.tensor(pixels).reshape(1, *pixels.shape[:2], -1).permute(0, 3, 1, 2)
        return {"pixels": stack}, {"wrt": "pixels", "image_processor": AutoImageProcessor.from_pretrained(name)}
    return {key: value[:1] if hasattr(value, "shape") else value for key, value in probe_inputs(model).items()}, {}


def _load(model: str):  # noqa: ANN202  one of transformers' many classes
    import transformers
    from transformers import AutoConfig, AutoModel

    import hf_lipschitz  # noqa: F401  registers the loading hook

    architectures = AutoConfig.from_pretrained(model).architectures or []
    auto = getattr(transformers, architectures[0], AutoModel) if architectures else AutoModel
    return auto.from_pretrained(model)


def main() -> None:
    """Entry point of the console script."""
    app()
