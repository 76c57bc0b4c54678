"""Which kernels run a layer: those of fla and flash-attn on CUDA, plain torch operations everywhere else.

The choice goes by the tensors' device, is made once a process for each kind of recurrence, and can be forced: by the
environment variable LIGER_BACKEND (`auto`, `torch` or `fla`), else by `backend` in the config's `liger` block. fla and
flash-attn are imported when the first CUDA tensor asks for them, never before: importing fla takes seconds.

Precision on CUDA: fla's chunked kernels take q, k and v in bfloat16 where the model is bfloat16 and nothing is divided
by, else in float32, whose products Triton rounds to TF32 (some three decimal digits); decays and states stay float32.
Its one-token kernels work in float32 throughout. LIGER_BACKEND=torch is float32 throughout as well.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from .liger_config import BACKENDS
from .liger_fla import MULTIPLE, adapted
from .liger_rules import Kernel, RecurrenceInputs, Rule

VARIABLE = "LIGER_BACKEND"
OLDEST_FLA = (0, 6)
INSTALL = {"fla": "pip install 'flash-linear-attention[cuda]>=0.6'", "flash_attn": "pip install 'flash-attn>=2.7'"}


class LigerBackendError(RuntimeError):
    """A backend was asked for by a name that there is not, or where it cannot run."""

    liger_exit_code = 4


@dataclass(frozen=True)
class Choice:
    """What runs a recurrence: `torch` or `fla`, why, and the two functions, called as `liger_recurrence`'s."""

    backend: str
    why: str
    chunk: Callable
    step: Callable


def requested(configured: str = "auto") -> str:
    """The backend asked for: LIGER_BACKEND where it is set, else the config's. Raises LigerBackendError."""
    name = os.environ.get(VARIABLE) or configured
    if name not in BACKENDS:
        raise LigerBackendError(f"{VARIABLE} is {name!r}, but has to be one of {', '.join(BACKENDS)}")
    return name


def recurrence(
    rule: Rule,
    inputs: RecurrenceInputs,
    states: tuple | None,
    configured: str = "auto",
    dtype=torch.float32,
    bounds=None,
):
    """A rule over T tokens: the step where T is 1 and there is a state, else the chunked form.

    Args:
        states: the rule's, before the first token; None for zeros.
        configured: the config's `backend`.
        dtype: in which fla's chunked kernels may take their products: bfloat16 or float32.
        bounds: [N + 1] int64, where the documents of a batch of one begin, and its end, for fla alone; or None.
    Returns:
        o [B, Hq, T, V] and the states after the last token, None of documents.
    Raises:
        LigerBackendError: `fla` is forced and cannot run here.
    """
    choice = choose(rule, *rule.kind(inputs.q, inputs.log_decay), on_cuda(inputs.q), requested(configured), dtype)
    if bounds is not None:
        return choice.chunk(*rule.arguments(inputs), None, bounds=bounds)
    function = choice.step if inputs.q.shape[2] == 1 and states is not None else choice.chunk
    output, states = function(*rule.arguments(inputs), rule.initial(states))
    return output, rule.final(states)


def on_cuda(x) -> bool:
    """Whether a tensor is where fla and flash-attn can be used."""
    return x.is_cuda


def takes_documents(rule: Rule, key_dim: int, slots: int, configured: str = "auto") -> bool:
    """Whether every kernel of the rule is fla's on CUDA, which is told where documents begin."""
    sizes = (key_dim, slots if rule.by_slot else None, True, requested(configured))
    return all(choose(rule, one, *sizes).backend == "fla" for one in rule.kernels)


@cache
def choose(
    rule: Rule,
    one_decay: bool,
    key_dim: int,
    slots: int | None,
    on_cuda: bool,
    wanted: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Choice:
    """What runs a rule of these sizes (see `Rule.kind`); as `recurrence`."""
    plain = partial(Choice, "torch", chunk=rule.forms.chunk, step=rule.forms.step)
    if wanted == "torch":
        return plain("asked for")
    kernel = rule.kernels[one_decay]
    functions, obstacle = None, "the tensors are not on a CUDA device"
    if on_cuda:
        obstacle = _unfit(kernel, key_dim, slots)
        if obstacle is None:
            functions, obstacle = fla_functions(kernel)
    if functions is None:
        if wanted == "fla":
            raise LigerBackendError(f"the backend fla was asked for, but {obstacle}; use auto or torch")
        return plain(obstacle)
    chunk, step = adapted(rule, *functions, kernel.step_decay, dtype)
    return Choice("fla", f"{kernel.chunk} and {kernel.step}", chunk, step)


def _unfit(kernel: Kernel, key_dim: int, slots: int | None) -> str | None:
    if kernel.widest_key and key_dim > kernel.widest_key:
        return f"{kernel.chunk} takes keys of at most {kernel.widest_key} dimensions, not {key_dim}"
    if slots is not None and slots % MULTIPLE:
        # A padded slot would take part in the softmax over slots.
        return f"{kernel.chunk} is used with a multiple of {MULTIPLE} slots only, not {slots}"
    return None


@cache
def fla_functions(kernel: Kernel) -> tuple[tuple[Callable, Callable] | None, str]:
    """fla's chunked and step function of a kernel, or None; and the reason why not. Imports fla."""
    try:
        version = str(importlib.import_module("fla").__version__)
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_FLA:
            wanted = ".".join(map(str, OLDEST_FLA))
            return None, f"flash-linear-attention is {version}, but has to be {wanted} or newer; {INSTALL['fla']}"
        module = importlib.import_module(kernel.module)
        return (getattr(module, kernel.chunk), getattr(module, kernel.step)), ""
    except ModuleNotFoundError as error:
        missing = "flash-linear-attention" if error.name == "fla" else f"{error.name}, which fla needs,"
        return None, f"{missing} is not installed; {INSTALL['fla']}"
    except Exception as error:  # whatever a broken installation raises is the reason
        return None, f"fla cannot be imported ({_sentence(error)})"


@cache
def flash_attn_function(name: str = "flash_attn_func") -> tuple[Callable | None, str]:
    """A function of flash-attn, or None; and the reason why not. Imports flash-attn."""
    try:
        return getattr(importlib.import_module("flash_attn"), name), ""
    except ModuleNotFoundError as error:
        missing = "flash-attn" if error.name == "flash_attn" else f"{error.name}, which flash-attn needs,"
        return None, f"{missing} is not installed; {INSTALL['flash_attn']}"
    except Exception as error:
        return None, f"flash-attn cannot be imported ({_sentence(error)})"


def _sentence(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def flash_window(q, head_dim: int, configured: str = "auto", name: str = "flash_attn_func") -> Callable | None:
    """flash-attn for a window over tensors like `q`, [B, Hq, T, D], or None where torch does it.

    It takes float16 and bfloat16 on CUDA and head dimensions up to 256. It cannot see padding, sink tokens or sink
    logits: such calls are torch's.
    """
    if not on_cuda(q) or q.dtype not in (torch.float16, torch.bfloat16) or head_dim > 256:
        return None
    return None if requested(configured) == "torch" else flash_attn_function(name)[0]


def describe_window(on_cuda: bool, wanted: str = "auto") -> tuple[str, str]:
    """(backend, why) of the window, for a report."""
    if wanted == "torch":
        return "torch", "asked for"
    if not on_cuda:
        return "torch", "the tensors are not on a CUDA device"
    function, obstacle = flash_attn_function()
    if function is None:
        return "torch", obstacle
    return "flash-attn", "half precision; torch where there is padding, sink tokens or sink logits"
