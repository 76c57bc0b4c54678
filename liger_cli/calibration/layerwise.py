"""Meeting every layer of the base while it reads some rows: its inputs, its heads' outputs and what an error costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from liger_cli.calibration.base import not_finite
from liger_cli.calibration.sizes import LOGITS_BYTES
from liger_cli.system.progress import progress


@dataclass
class Layer:
    """One layer's attention on some rows, as the base computes it.

    Attributes:
        q, k: before the rotary embedding, [B, Hq, T, D] and [B, Hkv, T, D]; rotated_q, rotated_k: after it.
        v: [B, Hkv, T, D].
        heads: the heads' outputs, what the output projection reads, [B, Hq, T, D] float32.
        gradient: at `heads`, of the log-likelihood of tokens drawn from the base's own distribution; None where it was
            not asked for. [B, Hq, T, D] float32
    """

    attention: torch.nn.Module
    q: torch.Tensor
    k: torch.Tensor
    rotated_q: torch.Tensor
    rotated_k: torch.Tensor
    v: torch.Tensor
    heads: torch.Tensor
    gradient: torch.Tensor | None = None

    @property
    def groups(self) -> int:
        """Query heads of a key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    def output_weight(self) -> torch.Tensor:
        """Of the output projection, [Hq, D, D_model] float32."""
        weight = projection(self.attention).weight.detach().float()
        return weight.T.unflatten(0, (self.heads.shape[1], -1))


def projection(attention):
    """The module that projects the heads' outputs back."""
    return attention.o_proj if hasattr(attention, "o_proj") else attention.dense


@torch.no_grad()
def visit(model, attentions: Sequence, rows: torch.Tensor, measure: Callable[[Layer], None], label: str) -> None:
    """Run the base over the rows; `measure` meets each of these layers once, with all rows.

    Args:
        rows: [B, T] token ids.
        label: of the progress line.
    """
    wanted = {attention.layer_idx for attention in attentions}
    with progress(label, len(wanted)) as step, _Softmax(model), _Calls(model, wanted) as calls:

        def after(attention, args, output):
            measure(calls.layer(attention))
            step()

        calls.after = after
        model.get_decoder()(rows, use_cache=False)


def visit_backward(
    model,
    attentions: Sequence,
    rows: torch.Tensor,
    measure: Callable[[Layer], None],
    label: str,
    seed: int = 0,
    what: str = "the measurement",
) -> None:
    """The same from the last layer to the first, row by row, with gradients.

    A decoder layer runs again when its turn in the backward pass comes, so memory holds one layer's activations and
    the inputs of the others. The tokens whose likelihood is taken are drawn from the base's own distribution, which
    makes the mean square of the gradient its Fisher information (Martens, arXiv 1412.1193, section 9).

    Args:
        rows: [B, T] token ids.
        seed: of the drawing.
        what: is measured, for an error.
    Raises:
        LigerError: probabilities or gradients that are not finite.
    """
    wanted = {attention.layer_idx for attention in attentions}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = list(model.get_decoder().layers)
    generator = torch.Generator(model.get_output_embeddings().weight.device).manual_seed(seed)
    model.requires_grad_(False)
    try:
        with progress(label, len(rows) * len(layers)) as step, _Softmax(model), _Calls(model, wanted) as calls:
            for row in rows.split(1):
                inputs, final = _inputs(model, layers, row)
                gradient = _likelihood_gradient(model, final, generator)
                if gradient is None:
                    raise not_finite(model, row, what)
                calls.clear()
                for layer, (args, kwargs) in zip(reversed(layers), reversed(inputs), strict=True):
                    hidden = args[0].detach().requires_grad_()
                    with torch.enable_grad():
                        output = layer(hidden, *args[1:], **kwargs)
                        output = output[0] if isinstance(output, tuple) else output
                        output.backward(gradient)
                    gradient = hidden.grad
                    if not gradient.isfinite().all():
                        raise not_finite(model, row, what)
                    attention = next((one for one in attentions if _within(one, layer)), None)
                    if attention is not None:
                        with torch.no_grad():
                            measure(calls.layer(attention))
                    calls.clear()
                    step()
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def _within(attention, layer) -> bool:
    return any(module is attention for module in layer.modules())


@torch.no_grad()
def _inputs(model, layers, row):
    """What every decoder layer is called with, and the hidden states that the decoder gives, [1, T, D_model]."""
    found = []

    def before(module, args, kwargs):
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        found.append(((hidden, *args[1:]), kwargs))

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    last: list = []
    hooks.append(layers[-1].register_forward_hook(lambda module, args, output: last.append(output)))
    try:
        model.get_decoder()(row, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found, last[0][0] if isinstance(last[0], tuple) else last[0]


def _likelihood_gradient(model, hidden, generator):
    """Of the drawn tokens' log-likelihood at the last layer's output, by pieces of positions; None if not finite."""
    size = max(1, LOGITS_BYTES // (4 * model.get_output_embeddings().weight.shape[0]))
    gradients = []
    for piece in hidden.split(size, dim=1):
        piece = piece.detach().requires_grad_()
        with torch.enable_grad():
            log_p = logits_of(model, piece).log_softmax(-1)
            probabilities = log_p[0].detach().exp()
            if not probabilities.isfinite().all():
                return None
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            log_p[0].gather(-1, drawn).sum().backward()
        gradients.append(piece.grad)
    return torch.cat(gradients, dim=1)


def logits_of(model, hidden):
    """Float32 logits of what the last layer gives, as the family makes them. [..., D_model] -> [..., V]"""
    last_norm = [child for name, child in model.get_decoder().named_children() if name.endswith("norm")][-1]
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
    scale = getattr(model.config, "logit_scale", None) or 1.0  # Cohere
    scale = scale / (getattr(model.config, "logits_scaling", None) or 1.0)  # Granite
    logits = model.get_output_embeddings()(last_norm(hidden)).float() * scale
    return (logits / cap).tanh() * cap if cap else logits


class _Softmax:
    """Within, the model is the base."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.model.set_attention_mode("softmax")

    def __exit__(self, *_error):
        self.model.set_attention_mode("liger")


class _Calls:
    """Within, what the wanted layers' attentions are called with, and what their output projections read."""

    def __init__(self, model, wanted: set[int]):
        self.attentions = [one for one in model.get_decoder().liger_attentions() if one.layer_idx in wanted]
        self.inputs: dict[int, tuple] = {}
        self.heads: dict[int, torch.Tensor] = {}
        self.after: Callable | None = None
        self.hooks: list = []

    def __enter__(self):
        for attention in self.attentions:
            index = attention.layer_idx

            def called(module, args, kwargs, index=index):
                self.inputs[index] = (args, kwargs)

            def projected(module, args, index=index):
                if args[0].requires_grad:
                    args[0].retain_grad()
                self.heads[index] = args[0]

            def done(module, args, output, index=index):
                if self.after is not None:
                    self.after(module, args, output)
                    self.clear()

            self.hooks += [
                attention.register_forward_pre_hook(called, with_kwargs=True),
                projection(attention).register_forward_pre_hook(projected),
                attention.register_forward_hook(done),
            ]
        return self

    def __exit__(self, *_error):
        for hook in self.hooks:
            hook.remove()
        self.clear()

    def clear(self) -> None:
        self.inputs.clear()
        self.heads.clear()

    def layer(self, attention) -> Layer:
        args, kwargs = self.inputs[attention.layer_idx]
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        q, k, v = attention.project(hidden)
        rotation = {name: value for name, value in kwargs.items() if name not in ("hidden_states", "attention_mask")}
        rotated_q, rotated_k = attention.rotate(q, k, **{"position_embeddings": None, **rotation})
        plain_q, plain_k = attention.without_positions(q, k)
        read = self.heads[attention.layer_idx]
        split = lambda x: x.detach().float().unflatten(-1, (q.shape[1], -1)).transpose(1, 2)  # noqa: E731
        gradient = None if read.grad is None else split(read.grad)
        return Layer(attention, plain_q, plain_k, rotated_q, rotated_k, v, split(read), gradient)
