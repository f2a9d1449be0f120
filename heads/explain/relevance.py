"""Layer-wise relevance propagation (LRP) through any network and head that torch runs, without rewriting them.

Bach et al. 2015; the rules as in Montavon et al. 2019, "Layer-Wise Relevance Propagation: An Overview". While a network runs
under ``Rules``, each linear operation returns its usual value with another gradient, such that input times gradient is
relevance: of an output's R = value × gradient, an input gets x ∂z/∂x · R / z, with z as the operation's rule has it. A batch
norm, or a factor for each channel, is folded into the convolution before it. ReLU, pooling, addition and the moving of numbers
need no rule.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from featurestore.errors import FeatureStoreError

Rule = Literal["epsilon", "gamma", "alpha-beta"]
_Operation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

GAMMA = 0.25
ALPHA, BETA = 2.0, 1.0
_STABILISER = 1e-6  # what keeps a denominator from zero
_LINEAR = {torch.conv1d, torch.conv2d, torch.conv3d, F.linear}
_RELU = {"relu", "relu_"}
_GATES = {"sigmoid", "hardsigmoid", "softmax"}  # taken as constants: relevance goes to what they are multiplied with
_PASSED = {  # relevance passes unchanged, as through a ReLU
    *("relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "hardtanh", "prelu", "tanh", "mish", "softplus")
}
_NATIVE = {  # value and gradient of these are relevance already
    *("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "neg", "__neg__", "sum", "mean"),
    *("flatten", "reshape", "view", "unflatten", "permute", "transpose", "t", "contiguous", "clone", "to", "float", "movedim"),
    *("cat", "concat", "stack", "__getitem__", "unbind", "split", "chunk", "squeeze", "unsqueeze", "expand", "expand_as"),
    *("pad", "dropout", "dropout2d", "dropout_", "max_pool2d", "max_pool2d_with_indices", "adaptive_max_pool2d", "max", "amax"),
    *("avg_pool2d", "adaptive_avg_pool2d", "embedding", "detach", "requires_grad_", "roll", "type_as", "maximum", "batch_norm"),
    *("_max_pool2d", "narrow", "select", "index_select"),
}  # fmt: skip
_PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "matmul", "__matmul__", "bmm", "mm"}
_QUOTIENTS = {"div", "div_", "true_divide", "__truediv__", "__itruediv__"}


@dataclass(frozen=True)
class _Pending:
    """A linear operation whose rule waits for what follows: a batch norm is folded in, after a ReLU only z > 0 counts."""

    output: torch.Tensor
    operation: _Operation
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    rule: Rule
    convolution: bool

    def scaled(self, scale: torch.Tensor, shift: torch.Tensor, output: torch.Tensor) -> "_Pending":
        """With each output channel multiplied and shifted."""
        weight = self.weight * scale.reshape(-1, *[1] * (self.weight.dim() - 1))
        bias = shift if self.bias is None else self.bias * scale + shift
        return replace(self, output=output, weight=weight, bias=bias)


class Rules(TorchFunctionMode):
    """A context in which networks run as always, and gradients are those of LRP.

    ``maps`` is the rule of convolutions, ``vectors`` of linear layers and of all operations with weights of ``head``. The
    operation that takes ``images`` (n, 3, y, x) itself gets the z-B rule between ``low`` and ``high``, both of that shape.
    What is explained is computed within the context too: the last operation gets its rule when it is read. FeatureStoreError at
    an operation that has no rule here.
    """

    def __init__(
        self,
        images: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        maps: Rule = "gamma",
        vectors: Rule = "epsilon",
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._images, self._low, self._high = images, low, high
        self._maps, self._vectors = maps, vectors
        self._of_head = frozenset(map(id, head.parameters())) if head else frozenset()
        self._pending: dict[int, _Pending] = {}
        self._done: dict[tuple[int, bool], torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a shape, a dtype
            return func(*args, **kwargs)
        if func in _LINEAR:
            return self._linear(func, *self._settled(args), **kwargs)
        before = self._pending.get(id(args[0])) if args else None
        if before is not None and func is F.batch_norm:
            return self._normalised(before, *args, **kwargs)
        if name == "addcmul" and len(args) == 3 and id(args[1]) in self._pending:
            return self._channelwise(self._pending[id(args[1])], *args)
        if before is not None and name in _RELU:
            out = torch.relu(self._ruled(before, before_relu=True))
            if name == "relu_" or kwargs.get("inplace") or True in args[1:]:
                self._done[id(before.output), False] = out  # what is read from now on
            return out
        return _other(name, func, self._settled(args), {key: self._settled((kwargs[key],))[0] for key in kwargs})

    def _settled(self, values: Any) -> Any:
        """Arguments, with the rules of linear operations among them applied."""

        def settled(value: Any) -> Any:
            if type(value) in (tuple, list):
                return self._settled(value)
            pending = self._pending.get(id(value))
            return value if pending is None else self._ruled(pending)

        return type(values)(map(settled, values))

    def _linear(
        self,
        func: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> torch.Tensor:
        def operation(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            out: torch.Tensor = func(x, weight, bias, *rest, **options)
            return out

        if not x.requires_grad:
            return operation(x, weight, bias)
        convolution = func is not F.linear
        rule = self._maps if convolution and id(weight) not in self._of_head else self._vectors
        with torch.no_grad():
            output = operation(x, weight, bias)
        return self._wait(_Pending(output.requires_grad_(), operation, x, weight.detach(), bias, rule, convolution))

    def _normalised(
        self,
        pending: _Pending,
        maps: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        """As ``torch.nn.functional.batch_norm``, in eval mode."""
        with torch.no_grad():
            scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
            shift = (0 if bias is None else bias) - running_mean * scale
            output = F.batch_norm(maps, running_mean, running_var, weight, bias, False, momentum, eps)
        return self._wait(pending.scaled(scale, shift, output.requires_grad_()))

    def _channelwise(self, pending: _Pending, shift: torch.Tensor, maps: torch.Tensor, scale: torch.Tensor) -> Any:
        with torch.no_grad():
            output = torch.addcmul(shift, maps, scale).requires_grad_()
            return self._wait(pending.scaled(scale.flatten(), shift.flatten(), output))

    def _wait(self, pending: _Pending) -> torch.Tensor:
        self._pending[id(pending.output)] = pending
        return pending.output

    def _ruled(self, pending: _Pending, before_relu: bool = False) -> torch.Tensor:
        """The operation's value, with the gradient that its rule says."""
        key = id(pending.output), before_relu
        if key not in self._done:
            self._done[key] = self._by_rule(pending, before_relu)
        return self._done[key]

    def _by_rule(self, pending: _Pending, before_relu: bool) -> torch.Tensor:
        value, x, weight, bias = pending.output.detach(), pending.x, pending.weight, pending.bias
        operation = pending.operation
        if pending.convolution and x.shape == self._images.shape and torch.equal(x, self._images):
            z = operation(x, weight, None) - operation(self._low, weight.clamp(min=0), None)
            z = z - operation(self._high, weight.clamp(max=0), None)
            return _with_gradient(value, (z, 1.0))
        if pending.rule == "epsilon":
            return _with_gradient(value, (operation(x, weight, bias), 1.0))
        rule = _Signed(operation, x, weight, bias)
        if pending.rule == "alpha-beta":
            return _with_gradient(value, (rule.z(1, 0, 1), ALPHA), (rule.z(1, 0, -1), -BETA))
        rising = rule.z(GAMMA, 1, 1)
        if before_relu:
            return _with_gradient(value, (rising, 1.0))
        return _with_gradient(value, (torch.where(value > 0, rising, rule.z(GAMMA, 1, -1)), 1.0))


class _Signed:
    """Sums of the products of inputs and weights that have one sign, which rules add up or single out."""

    def __init__(self, operation: _Operation, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.operation, self.x, self.weight, self.bias = operation, x, weight, bias
        self.negative = bool((x < 0).any())

    def z(self, factor: float, own: float, sign: int) -> torch.Tensor:
        """``own`` times all products plus ``factor`` times those of ``sign``."""
        limits: tuple[dict[str, Any], dict[str, Any]] = {"min": 0}, {"max": 0}
        same, other = limits if sign > 0 else limits[::-1]
        bias = None if self.bias is None else own * self.bias + factor * self.bias.clamp(**same)
        weight = own * self.weight + factor * self.weight.clamp(**same)
        if not self.negative:
            return self.operation(self.x, weight, bias)
        turned = own * self.weight + factor * self.weight.clamp(**other)
        return self.operation(self.x.clamp(min=0), weight, bias) + self.operation(self.x.clamp(max=0), turned, None)


def _with_gradient(value: torch.Tensor, *parts: tuple[torch.Tensor, float]) -> torch.Tensor:
    """``value``, and for each (z, share) the gradient share · value / z · ∂z."""
    out = value
    for z, share in parts:
        fixed = z.detach()
        ratio = share * value / torch.where(fixed < 0, fixed - _STABILISER, fixed + _STABILISER)
        out = out + _zero_with_gradient(z, ratio)
    return out


def _zero_with_gradient(z: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    zero: torch.Tensor = _Scaled.apply(z, ratio)
    return zero


class _Scaled(torch.autograd.Function):
    """Zero, whose gradient is ``ratio``."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        """A zero that takes no memory."""
        ctx.save_for_backward(ratio)
        return z.new_zeros(()).expand(z.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """That of z."""
        (ratio,) = ctx.saved_tensors
        return gradient * ratio, None


def _other(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """An operation that is not linear in one argument with weights."""
    if name in _PRODUCTS and len(args) > 1 and all(_varies(each) for each in args[:2]):
        one, two = args[:2]  # each of two that depend on the photographs gets half
        return (func(one, two.detach()) + func(one.detach(), two)) / 2
    if name in _QUOTIENTS and len(args) > 1 and _varies(args[1]):
        return func(args[0], args[1].detach(), *args[2:], **kwargs)
    if name in _GATES:
        return func(*args, **kwargs).detach()
    if name == "layer_norm":
        return _layer_norm(*args, **kwargs)
    if name == "normalize":
        return _of_length_one(*args, **kwargs)
    if name in _PASSED:
        return _as_scaling(func(*args, **kwargs), args[0])
    result = func(*args, **kwargs)
    if name not in _NATIVE | _RELU | _PRODUCTS | _QUOTIENTS and _varies(result):
        raise FeatureStoreError(
            f"LRP has no rule for {name or func}(), which this network or head computes. Methods that need gradients or outputs "
            "alone work: grad-cam, integrated-gradients, occlusion."
        )
    return result


def _varies(value: Any) -> bool:
    """Whether it depends on the photographs."""
    if isinstance(value, tuple | list):
        return any(map(_varies, value))
    return isinstance(value, torch.Tensor) and value.requires_grad


def _as_scaling(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``value`` as x times a constant for each number, so that relevance passes unchanged."""
    value, fixed = value.detach(), x.detach()
    return value + _zero_with_gradient(x, value / torch.where(fixed < 0, fixed - 1e-9, fixed + 1e-9))


def _layer_norm(x: torch.Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    """Linear, with the spread taken as a constant."""
    axes = tuple(range(-len(shape), 0))
    spread = (x.detach().var(axes, correction=0, keepdim=True) + eps).sqrt()
    out = (x - x.mean(axes, keepdim=True)) / spread
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _of_length_one(x: torch.Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Any:
    """Linear, with the length taken as a constant."""
    return x / x.detach().norm(p, dim, keepdim=True).clamp_min(eps)
