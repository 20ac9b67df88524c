"""The transformers pipeline that returns certificates."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import Pipeline
from transformers.image_utils import load_image

from hf_lipschitz.bounds import LipschitzBound
from hf_lipschitz.certification import (
    ABSTAIN,
    Certificate,
    Checkpoints,
    SmoothedClassifier,
    SmoothingConfig,
    WindowOfInputs,
    windows_of,
)
from hf_lipschitz.conversion import materialized
from hf_lipschitz.deterministic import DETERMINISTIC, DeterministicClassifier
from hf_lipschitz.fingerprints import fingerprint
from hf_lipschitz.integrations.base_classifiers import PIXEL_UNIT, base_classifier
from hf_lipschitz.integrations.denoisers import denoised
from hf_lipschitz.integrations.sharing import certify_in_shares, processes_of
from hf_lipschitz.model_bounds import graph_of


if TYPE_CHECKING:
    from accelerate import Accelerator


SMOOTHING_FIELDS = {field.name for field in dataclasses.fields(SmoothingConfig)}


class CertifiedClassificationPipeline(Pipeline):
    """Certified classification of texts and images; task `"certified-classification"`.

    By randomized smoothing, or with `certificate="deterministic"` by the Lipschitz constant of the model, which must
    then be finite: the bound is computed once for each shape of input, and anew when the weights change.

    Noise is added to the word embeddings of a text, or to the pixels of an image in [0, 1] after resizing and before
    normalisation. The radius is in that unit, which each certificate names. Noisy copies of the inputs of a list share
    batches; with `radii` or `gain` each input is sampled only until it is decided.

    Args:
        model (`PreTrainedModel` or `str`):
            A text or image classifier with at least two labels. Constrained layers are materialised while it runs.
        tokenizer, image_processor:
            What prepares its inputs; `pipeline(...)` loads them with the model.
        smoothing (`SmoothingConfig`, *optional*):
            Or its fields as keywords, as `sigma` (needed, but for `"deterministic"`); `batch_size` is the number of
            noisy copies a forward pass. All may be given in a call as well. For `"lipschitz"` the constant of the
            model is computed if `score_lipschitz` is missing.
        denoiser (`Callable[[Tensor], Tensor]`, *optional*):
            For images: takes the noise off before the model sees them ([`DenoisedClassifier`]), as a conv denoiser or
            [`OneStepDiffusionDenoiser`]. It is part of the base classifier.
        accelerator (`accelerate.Accelerator`, *optional*):
            Shares the batches of a list over its processes. Every process returns the whole list, and the counts are
            those of one process.
        progress_bar (`bool`, *optional*, defaults to `True`):
            Shows one for lists, on the main process.

    Returns:
        [`Certificate`] for one input, a list for a list or a dataset with a length, an iterator for a generator.

    Raises:
        ValueError, TypeError, RuntimeError: the model is no single-label classifier, is in train mode, the pixel unit
        of
            its processor cannot be folded in, a smoothing field is out of range, a text is empty, logits are not
            finite.

    Example::

        certifier = pipeline("certified-classification", model="my-model", sigma=0.25, n=1000)
        certifier("a good film")   # Certificate(prediction=1, radius=0.41, ...)
    """

    def __init__(
        self,
        *args: Any,
        denoiser: Callable[[Tensor], Tensor] | None = None,
        accelerator: Accelerator | None = None,
        progress_bar: bool = True,
        **kwargs: Any,
    ) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if accelerator is not None:
            model.to(accelerator.device)
            kwargs.setdefault("device", accelerator.device)
        super().__init__(*args, **kwargs)
        self.accelerator = accelerator
        self.progress_bar = progress_bar
        self.base_classifier = base_classifier(self.model, self.tokenizer, self.image_processor)
        if denoiser is not None:
            self.base_classifier = denoised(denoiser, self.base_classifier)
        self._deterministic: tuple[str, DeterministicClassifier] | None = None
        self._bounds: dict[tuple[int, ...], LipschitzBound] = {}

    def _sanitize_parameters(
        self, smoothing: SmoothingConfig | None = None, **fields: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        unknown = sorted(set(fields) - SMOOTHING_FIELDS)
        if unknown:
            raise TypeError(
                f"unknown argument {', '.join(unknown)}; the smoothing takes {', '.join(SMOOTHING_FIELDS)}"
            )
        given = {} if smoothing is None else smoothing.to_dict()
        return {}, {**given, **fields}, {}

    def preprocess(self, inputs: Any) -> dict[str, Tensor]:
        if self.base_classifier.unit == PIXEL_UNIT and isinstance(inputs, str):
            inputs = load_image(inputs)
        return {"x": self.base_classifier.encode(inputs)}

    def _forward(self, model_inputs: dict[str, Tensor], *, index: int = 0, **fields: Any) -> Certificate:
        if _config(fields).certificate == DETERMINISTIC:
            return self._deterministic[1].certify(model_inputs["x"], index)
        return self.smoothed(_config(fields), model_inputs["x"]).certify(model_inputs["x"], index)

    def postprocess(self, certificate: Certificate) -> Certificate:
        if certificate.prediction == ABSTAIN:
            return dataclasses.replace(certificate, label="ABSTAIN")
        return dataclasses.replace(certificate, label=str(self.model.config.id2label[certificate.prediction]))

    def __call__(
        self,
        inputs: Any,
        *,
        index: int = 0,
        batch_size: int | None = None,
        progress_bar: bool | None = None,
        **kwargs: Any,
    ) -> Certificate | list[Certificate] | Iterator[Certificate]:
        """Certifies one input, or each of several.

        Args:
            inputs (`str`, image, list, dataset or generator):
                Texts, or images as PIL images, arrays, tensors, paths or URLs.
            index (`int`, *optional*, defaults to `0`):
                Of the first input; the noise of each is a function of the seed and its index.
            batch_size (`int`, *optional*):
                Noisy copies a forward pass.
            progress_bar (`bool`, *optional*):
                In the place of the pipeline's own.
            kwargs:
                Smoothing fields, in the place of the pipeline's own.
        """
        fields = self._fields(batch_size, **kwargs)
        self._bind_weights(_config(fields))
        show = self.progress_bar if progress_bar is None else progress_bar

        def certify(item: Any, position: int) -> Certificate:
            return self.run_single(item, {}, {**fields, "index": position}, {})

        if not _is_collection(inputs):
            return certify(inputs, index)
        if not isinstance(inputs, Sized):
            return (certify(item, position) for position, item in enumerate(inputs, start=index))
        if _config(fields).certificate == DETERMINISTIC:
            return self._certify_one_by_one(inputs, index, certify, show)
        return self._certify_together(inputs, index, _config(fields), show)

    def smoothing_config(self, **kwargs: Any) -> SmoothingConfig:
        """The smoothing of a call with these keywords.

        Raises:
            ValueError: `sigma` is missing or a field is out of range.
        """
        return _config(self._fields(kwargs.pop("batch_size", None), **kwargs))

    def _fields(self, batch_size: int | None, **kwargs: Any) -> dict[str, Any]:
        fields = {**self._forward_params, **self._sanitize_parameters(**kwargs)[1]}
        batch = batch_size if batch_size is not None else self._batch_size
        return fields if batch is None else {**fields, "batch_size": batch}

    def smoothed(self, config: SmoothingConfig, x: Tensor) -> SmoothedClassifier:
        """The smoothed classifier of inputs of the shape of x; on materialised weights."""
        matched = getattr(getattr(self.base_classifier, "denoiser", None), "sigma", config.sigma)
        if matched != config.sigma:
            raise ValueError(
                f"the denoiser is for sigma={matched}, and the noise has {config.sigma}: give both the same"
            )
        if config.certificate == "lipschitz" and config.score_lipschitz is None:
            config = dataclasses.replace(config, score_lipschitz=self._bound_for(x))
        return SmoothedClassifier(
            self.base_classifier, self.model.config.num_labels, config, unit=self.base_classifier.unit
        )

    def certify_windows(
        self,
        inputs: Sequence[Any],
        config: SmoothingConfig,
        *,
        first: int = 0,
        done: Container[int] = (),
        checkpoints: Callable[[WindowOfInputs], Checkpoints] | None = None,
    ) -> Iterator[tuple[int, Certificate]]:
        """Certifies a list, a window of inputs at a time, on materialised weights.

        Args:
            inputs (`Sequence`):
                Texts or images.
            config (`SmoothingConfig`):
                The smoothing.
            first (`int`, *optional*, defaults to `0`):
                Index of the first input.
            done (`Container[int]`, *optional*):
                Places that are certified already.
            checkpoints (`Callable`, *optional*):
                What keeps the counts of a window.

        Yields:
            `tuple[int, Certificate]`: the place of an input and its certificate, as soon as it is decided. Places that
            are done may come again.
        """
        self._bind_weights(config)

        def encode(place: int) -> Tensor:
            return self.preprocess(inputs[place])["x"]

        with self.device_placement(), materialized(self.model):
            windows = windows_of(encode, len(inputs), done=done, by_shape=config.certificate == "lipschitz")
            for window in windows:
                kept = None if checkpoints is None else checkpoints(window)
                found = self.smoothed(config, window.xs[0]).certify_together(
                    window.xs,
                    [first + place for place in window.places],
                    processes=processes_of(self.accelerator),
                    checkpoints=kept,
                )
                for place, certificate in found:
                    yield window.places[place], self.postprocess(certificate)

    def _bound_for(self, x: Tensor) -> LipschitzBound:
        if tuple(x.shape) not in self._bounds:
            (argument,) = inspect.signature(self.base_classifier.forward).parameters
            bound = graph_of(self.base_classifier, {argument: x[None]}, argument).bound()
            if bound.log_value == math.inf:
                raise ValueError(
                    "certificate='lipschitz' needs a finite Lipschitz constant of the model, and none is known: "
                    f"{bound.blame[0]}. print(lipschitz_bound(...)) lists what is to blame"
                )
            self._bounds[tuple(x.shape)] = bound
        return self._bounds[tuple(x.shape)]

    def _bind_weights(self, config: SmoothingConfig) -> None:
        """Keeps the bounds of the weights that the model has at present, and no others."""
        if config.certificate not in (DETERMINISTIC, "lipschitz"):
            return
        present = fingerprint(self.base_classifier)
        if self._deterministic is None or self._deterministic[0] != present:
            self._deterministic = (present, DeterministicClassifier(self.base_classifier, self.base_classifier.unit))
            self._bounds = {}

    def _certify_together(
        self, inputs: Sequence[Any], first: int, config: SmoothingConfig, show: bool
    ) -> list[Certificate]:
        found: dict[int, Certificate] = {}
        with self._bar(len(inputs), show) as bar:
            for place, certificate in self.certify_windows(inputs, config, first=first):
                found[place] = certificate
                bar.update()
        return [found[place] for place in range(len(inputs))]

    def _certify_one_by_one(self, inputs: Sequence[Any], first: int, certify: Any, show: bool) -> list[Certificate]:
        with self._bar(len(inputs), show) as bar:

            def certify_position(position: int) -> Certificate:
                certificate = certify(inputs[position], first + position)
                bar.update(1 if self.accelerator is None else self.accelerator.num_processes)
                return certificate

            if self.accelerator is None:
                return [certify_position(position) for position in range(len(inputs))]
            return certify_in_shares(certify_position, len(inputs), self.accelerator)

    def _bar(self, total: int, show: bool) -> Any:
        is_main = self.accelerator is None or self.accelerator.is_main_process
        return tqdm(total=total, desc="certifying", disable=not (show and is_main))

    def forward(self, model_inputs: dict[str, Tensor], **forward_params: Any) -> Certificate:
        with materialized(self.model):
            return super().forward(model_inputs, **forward_params)


def _config(fields: dict[str, Any]) -> SmoothingConfig:
    if "sigma" not in fields and fields.get("certificate") != DETERMINISTIC:
        raise ValueError("sigma is missing: pass sigma=..., the standard deviation of the noise, in the input's unit")
    return SmoothingConfig(**fields)


def _is_collection(inputs: Any) -> bool:
    if isinstance(inputs, (str, bytes, Tensor)) or hasattr(inputs, "__array__") or hasattr(inputs, "convert"):
        return False
    return isinstance(inputs, Iterable) or (hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__"))
