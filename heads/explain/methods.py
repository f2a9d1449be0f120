"""Attribution methods (``names`` says what they show): for one trial, how much each pixel of its photographs speaks for a choice.

Every method maps a ``Trial`` to relevance (places, y, x) float32: positive for the choice that is explained, negative against it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from featurestore.errors import FeatureStoreError
from featurestore.text import near_matches
from heads.explain.relevance import Rule, Rules
from heads.legs import Legs

Explained = Literal["margin", "logit"]

STEPS = 64  # of integrated gradients: points on the path
_WINDOWS = 8  # of occlusion, across the square; they move by half their side
_AT_ONCE = 12  # photographs in a forward pass, where there are many


@dataclass(frozen=True)
class Trial:
    """What is explained: the photographs of one example, and one of the head's logits.

    ``pixels`` (places, size, size, 3) are the recipe's, uint8. ``choice`` is the number of a logit: of a place, a class.
    ``explained`` is that ``logit``, or its ``margin`` over the largest of the others. ``steps`` are those of integrated
    gradients.
    """

    legs: Legs
    pixels: torch.Tensor
    choice: int
    explained: Explained = "margin"
    steps: int = STEPS

    def inputs(self) -> torch.Tensor:
        """(1, places, 3, size, size), a leaf whose gradient can be asked for."""
        return self.legs.inputs(self.pixels[None]).detach().requires_grad_()

    @property
    def at_once(self) -> int:
        """Examples in a forward pass, where many are computed."""
        return max(1, _AT_ONCE // self.legs.n_places)

    def value(self, logits: torch.Tensor) -> torch.Tensor:
        """(n, classes) to what is explained, (n,)."""
        chosen = logits[:, self.choice]
        if self.explained == "logit" or logits.shape[1] == 1:
            return chosen
        others = [i for i in range(logits.shape[1]) if i != self.choice]
        return chosen - logits[:, others].amax(1)

    def of_inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs (n, places, 3, size, size) to what is explained, (n,)."""
        return self.value(self.legs.run(inputs).logits)

    def logits(self) -> torch.Tensor:
        """(classes,) of the photographs as they are."""
        with torch.no_grad():
            logits: torch.Tensor = self.legs(self.pixels[None])[0]
        return logits


Function = Callable[[Trial], torch.Tensor]


def _cam(trial: Trial, kind: Literal["grad-cam", "grad-cam++", "hires-cam"]) -> torch.Tensor:
    """Class activation maps: the maps of a layer, weighted and summed, then brought to the square bilinearly.

    Grad-CAM (Selvaraju et al. 2017) weights each map by its mean gradient, wherever in it that is; their ReLU of the sum is
    left out, so that its sign shows. Grad-CAM++ (Chattopadhay et al. 2018) weights by positive gradients where these and the maps
    are strong. HiResCAM (Draelos & Carin 2020) takes maps times gradients place by place, which is what a head depends on that
    reads places apart, as a bridge over flattened maps does.
    """
    inputs = trial.inputs()
    passed = trial.legs.run(inputs)
    assert passed.maps is not None  # or it would not apply
    maps = passed.maps.float()
    (gradient,) = torch.autograd.grad(trial.value(passed.logits).sum(), passed.maps)
    maps, gradient = maps.detach(), gradient.float()
    if kind == "hires-cam":
        weights = gradient
    elif kind == "grad-cam++":
        share = 1 / (2 + maps.sum((2, 3), keepdim=True) * gradient)  # their g² / (2 g² + Σ A g³)
        weights = (gradient.clamp(min=0) * share).sum((2, 3), keepdim=True)
    else:
        weights = gradient.mean((2, 3), keepdim=True)
    cam = (weights * maps).sum(1, keepdim=True)
    square: torch.Tensor = F.interpolate(cam, size=inputs.shape[-2:], mode="bilinear", align_corners=False)
    return square.squeeze(1)


class _Guided(torch.autograd.Function):
    """ReLU whose gradient is that of positive gradients alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """ReLU."""
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Where x and the gradient are positive."""
        (x,) = ctx.saved_tensors
        passed: torch.Tensor = gradient.clamp(min=0) * (x > 0)
        return passed


class _GuidedReLU(TorchFunctionMode):
    """A context in which every ReLU, module or function, is ``_Guided``. ``count`` says how many there were."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("relu", "relu_"):
            self.count += 1
            return _Guided.apply(args[0])
        return func(*args, **(kwargs or {}))


def _guided_backprop(trial: Trial) -> torch.Tensor:
    """Springenberg et al. 2015, times the input and summed over channels, so that it has the sign of what a pixel speaks for."""
    with _GuidedReLU() as mode:
        relevance = _input_times_gradient(trial)
    if not mode.count:
        raise FeatureStoreError("guided-backprop changes how ReLUs pass gradients, and this network has none.")
    return relevance


def _input_times_gradient(trial: Trial) -> torch.Tensor:
    inputs = trial.inputs()
    (gradient,) = torch.autograd.grad(trial.of_inputs(inputs).sum(), inputs)
    return (inputs.detach() * gradient)[0].sum(1)


def _lrp(trial: Trial, maps: Rule, vectors: Rule) -> torch.Tensor:
    """See ``heads.explain.relevance``."""
    inputs = trial.inputs()
    low, high = (bound.requires_grad_() for bound in _bounds(trial.legs, inputs))
    with Rules(inputs.detach().flatten(0, 1), low, high, maps, vectors, trial.legs.head):
        value = trial.of_inputs(inputs).sum()
    gradients = torch.autograd.grad(value, [inputs, low, high], allow_unused=True)
    parts = [
        (given.detach() * gradient).view(inputs.shape[1:]).sum(1)
        for given, gradient in zip((inputs, low, high), gradients, strict=True)
        if gradient is not None
    ]
    return torch.stack(parts).sum(0)


def _bounds(legs: Legs, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What black and white pixels are as inputs, (places, 3, size, size) each."""
    low, high = (legs.inputs(torch.full((1, *legs.shape), float(grey)))[0] for grey in (0, 255))
    return low.detach().clone(), high.detach().clone()


def _integrated_gradients(trial: Trial) -> torch.Tensor:
    """Sundararajan et al. 2017, from the recipe's mean colour, summed over channels."""
    captum = _captum()
    inputs = trial.inputs()
    relevance: torch.Tensor = captum.IntegratedGradients(trial.of_inputs).attribute(
        inputs, torch.zeros_like(inputs), n_steps=trial.steps, internal_batch_size=trial.at_once
    )
    return relevance.detach()[0].sum(1).float()


def _occlusion(trial: Trial) -> torch.Tensor:
    """Zeiler & Fergus 2014: how much what is explained falls where a window has the recipe's mean colour.

    Only the photograph that is occluded is computed anew.
    """
    captum, legs = _captum(), trial.legs
    side = math.ceil(legs.recipe.size / _WINDOWS)
    with torch.no_grad():
        inputs = trial.inputs().detach()
        rows = legs.run(inputs).rows
        out = []
        for place in range(legs.n_places):

            def value(images: torch.Tensor, place: int = place) -> torch.Tensor:
                live = legs.backbone(images.contiguous(memory_format=torch.channels_last))[legs.layer.name]
                each = [live if i == place else row.expand_as(live) for i, row in enumerate(rows.split(1))]
                return trial.value(legs.head(*each))

            relevance = captum.Occlusion(value).attribute(
                inputs[0, place : place + 1],
                sliding_window_shapes=(3, side, side),
                strides=(3, math.ceil(side / 2), math.ceil(side / 2)),
                baselines=0,
                perturbations_per_eval=_AT_ONCE,
            )
            out.append(relevance[0, 0].float())
    return torch.stack(out)


def _captum() -> Any:
    try:
        from captum import attr
    except ImportError as error:
        raise FeatureStoreError(
            f"integrated-gradients and occlusion need Captum ({error}): pip install 'face-featurestore[explain]'."
        ) from None
    return attr


@dataclass(frozen=True)
class Method:
    """An attribution method. ``passes`` of the network, forward and backward, are what it costs for one photograph, roughly.

    ``needs`` is ``maps`` for one that works on a layer of them. ``conserves``: the sum of its relevance should be the
    ``value`` that is explained, or the ``change`` of it from photographs of the mean colour.
    """

    name: str
    function: Function
    passes: float = 1.0
    needs: Literal["", "maps"] = ""
    conserves: Literal["", "value", "change"] = ""

    def refuse_useless(self, legs: Legs) -> None:
        """FeatureStoreError where the method does not apply to a network and head, with those that do."""
        if self.needs == "maps" and legs.maps is None:
            others = ", ".join(name for name, method in METHODS.items() if method.needs != "maps")
            raise FeatureStoreError(
                f"{self.name} weights maps (channel, y, x), and {legs.weights.backbone.name} has none up to layer "
                f"{legs.layer.name!r}. Methods that need none: {others}."
            )


def find_methods(names: Iterable[str]) -> list[Method]:
    """The methods of those names, without repeats; FeatureStoreError for a name that there is not."""
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in METHODS:
            raise FeatureStoreError(f"there is no method {name!r}. {near_matches(name, METHODS)}")
    return [METHODS[name] for name in names]


_LRP = partial(_lrp, maps="gamma", vectors="epsilon")
_RULES: tuple[tuple[Rule, Rule], ...] = (("epsilon", "epsilon"), ("gamma", "gamma"), ("alpha-beta", "epsilon"))
_LRP_EPSILON, _LRP_GAMMA, _LRP_ALPHA_BETA = (partial(_lrp, maps=maps, vectors=vectors) for maps, vectors in _RULES)
_PATCHES = float((2 * _WINDOWS - 1) ** 2)
# Passes: medians of five rounds beside input-x-gradient, between those of dlib_resnet_v1 and VGG-Face (two cores); the last
# two are counted.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("grad-cam", partial(_cam, kind="grad-cam"), 0.6, needs="maps"),
        Method("grad-cam++", partial(_cam, kind="grad-cam++"), 0.6, needs="maps"),
        Method("hires-cam", partial(_cam, kind="hires-cam"), 0.6, needs="maps"),
        Method("lrp", _LRP, 3.0, conserves="value"),
        Method("lrp-epsilon", _LRP_EPSILON, 2.2, conserves="value"),
        Method("lrp-gamma", _LRP_GAMMA, 4.0, conserves="value"),
        Method("lrp-alpha-beta", _LRP_ALPHA_BETA, 3.5, conserves="value"),
        Method("guided-backprop", _guided_backprop, 1.2),
        Method("input-x-gradient", _input_times_gradient),
        Method("integrated-gradients", _integrated_gradients, STEPS, conserves="change"),
        Method("occlusion", _occlusion, _PATCHES / 2),
    )
}
