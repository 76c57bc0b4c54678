"""What a recurrence rule is. No torch here: the command line reads the rules and gates for names and state sizes.

The rules themselves are rows of `liger_gates`; a rule called `decay` computes by `liger_recurrence`'s `naive_decay`,
`chunk_decay` and `step_decay`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass
class RecurrenceInputs:
    """What a gate hands to its recurrence. H is the number of states: key/value heads, or query heads where these
    differ.

    Attributes:
        q: [B, Hq, T, D] queries; the Hq / H query heads of a group read one shared state.
        k: [B, H, T, D] keys; v: [B, H, T, Dv] values.
        log_decay: [B, H, T, D] (per key channel), [B, H, T, 1] (per head) or [B, H, T, M] (per slot); <= 0.
        beta: [B, H, T, 1] write strength of the delta rule, else None.
        write: [B, H, T, M] write weight of every slot (`gsa`), else None.
    """

    q: object
    k: object
    v: object
    log_decay: object
    beta: object = None
    write: object = None

    def masked(self, valid) -> "RecurrenceInputs":
        """Positions where `valid` ([B, T] or [B, H, T] bool) is false neither write nor decay: the state stays."""
        keep = (valid[:, None] if valid.ndim == 2 else valid).unsqueeze(-1)
        given = {name: x for name, x in vars(self).items() if name != "q" and x is not None}
        return replace(self, **{name: x.masked_fill(~keep, 0.0) for name, x in given.items()})


@dataclass(frozen=True)
class Kernel:
    """Where fla has one kind of recurrence.

    Attributes:
        module: of fla. chunk, step: its chunked and its step-by-step function.
        step_decay: the argument that the latter takes the decay by.
        widest_key: the widest key that both take, or None.
    """

    module: str
    chunk: str
    step: str
    step_decay: str = "g"
    widest_key: int | None = None


@dataclass(frozen=True, eq=False)
class Rule:
    """How a state is written and read.

    Attributes:
        name: of its functions.
        states: (features, head_dim, slots) -> shapes of the float32 states of one head.
        kernels: fla's, by whether a head has one decay (else one a key channel or slot).
        inputs: fields of `RecurrenceInputs` that its functions take behind q, k, v and log_decay.
        divisible: its output is a sum over the text, which the same sum over ones can divide.
        by_slot: decays are one a memory slot, and the states are two, of the slots' keys and values.
    """

    name: str
    states: Callable
    kernels: dict[bool, Kernel]
    inputs: tuple[str, ...] = ()
    divisible: bool = False
    by_slot: bool = False

    @property
    def forms(self):
        """Its `Forms`: the definition, the chunked form and the one-token step. Imports torch."""
        from .liger_recurrence import FORMS

        return FORMS[self.name]

    def arguments(self, inputs: RecurrenceInputs) -> list:
        """What its functions take before the state."""
        extra = [getattr(inputs, name) for name in self.inputs]
        return [inputs.q, inputs.k, inputs.v, inputs.log_decay, *extra]

    def initial(self, states: tuple | None):
        """A tuple of states, or None, as its functions take them."""
        return states if states is None or self.by_slot else states[0]

    def final(self, states) -> tuple:
        """The states that its functions return, as a tuple."""
        return tuple(states) if self.by_slot else (states,)

    def kind(self, q, log_decay) -> tuple[bool, int, int | None]:
        """What kernels differ by: whether a head has one decay, the width of a key, and the number of slots."""
        slots = log_decay.shape[-1] if self.by_slot else None
        return slots is None and log_decay.shape[-1] == 1, q.shape[-1], slots
