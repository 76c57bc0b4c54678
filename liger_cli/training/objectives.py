"""What is minimised: cross-entropy, distillation from the original model, attention transfer.

The teacher is always the very same weights with LoRA off and softmax attention on: no second copy. All three are sums
over tokens; the trainer divides by the global batch's count, so gradient accumulation and processes change nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from random import Random

import torch
import torch.nn.functional as F
from peft import PeftModelForCausalLM
from torch.utils.checkpoint import checkpoint

from liger_cli.training.data import IGNORED
from liger_cli.training.extras import save_beside_lora
from liger_cli.training.recipes import Stage

MSE_FACTOR = 1000  # of LoLCATs' attention transfer
CHUNK_ELEMENTS = 1 << 25  # logits at a time: 128 MiB in float32


class TrainedModel(PeftModelForCausalLM):
    """A PEFT model whose forward is the objective, so that data-parallel wrappers see one forward a step.

    Made by swapping the class of a `PeftModelForCausalLM`; saving and loading stay PEFT's.

    Attributes:
        stage: the stage in force.
        loss_mean: the recipe's.
        train_extra: whether some stage trains the extra parameters, so that they are saved.
    """

    stage: Stage
    loss_mean = "tokens"
    train_extra = False

    def forward(self, input_ids, labels, lengths, position_ids=None):
        """A batch of `packing.Collator` -> `{"loss": sum over tokens}`, a float32 scalar."""
        return {"loss": objective_sum(self, self.stage, input_ids, labels, lengths, position_ids)}

    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        """As PEFT's, with the trained extra parameters in the adapter's file."""
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        if self.train_extra and kwargs.get("is_main_process", True):
            save_beside_lora(self, save_directory, state_dict)

    def logits_model(self):
        """The causal language model under the adapter."""
        return self.get_base_model()


def objective_sum(model: TrainedModel, stage: Stage, input_ids, labels, lengths, position_ids=None) -> torch.Tensor:
    """The stage's objective summed over the micro-batch: predicted tokens (or rows) for `ce`, else all tokens.

    Args:
        input_ids, labels, lengths, position_ids: of `packing.Collator`; no position_ids where a row is one document.
    """
    if stage.objective in ("transfer", "transfer-heads"):
        return transfer_sum(model, input_ids, lengths, position_ids, heads=stage.objective == "transfer-heads")
    if stage.objective == "distill":
        weights = (stage.temperature, stage.ce_weight)
        return distill_sum(model, input_ids, labels, lengths, position_ids, *weights)
    return ce_sum(model, input_ids, labels, position_ids)


def counts(labels, lengths) -> tuple[int, int, int]:
    """What the sums are divided by: predicted tokens, or rows that have some (for `ce`), and all tokens (for the other
    objectives). In the order predicted tokens, all tokens, rows."""
    predicted = (labels[:, 1:] != IGNORED).sum(1)
    return int(predicted.sum()), int(lengths.sum()), int((predicted > 0).sum())


def divisor(model: TrainedModel, stage: Stage, totals):
    """Which of the `counts` of a global batch the stage's sum is divided by."""
    predicted, every, rows = totals
    if stage.objective != "ce":
        return every
    return rows if model.loss_mean == "rows" else predicted


def ce_sum(model: TrainedModel, input_ids, labels, position_ids=None) -> torch.Tensor:
    """Next-token cross-entropy summed over the labels, in chunks: the logits of the whole batch never exist at once.

    With `loss_mean: rows` the sum over rows of each row's mean.
    """
    hidden = hidden_states(model, input_ids, position_ids)
    targets = labels[:, 1:]
    trained = targets != IGNORED
    weights = torch.ones_like(targets, dtype=torch.float32)
    if model.loss_mean == "rows":
        weights = weights / trained.sum(1, keepdim=True).clamp_min(1)

    def loss(logits, target, weight):
        return (F.cross_entropy(logits, target, reduction="none") * weight).sum()

    return _chunked(model, loss, hidden[:, :-1][trained], targets[trained], weights[trained])


def distill_sum(
    model: TrainedModel,
    input_ids,
    labels,
    lengths,
    position_ids=None,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
) -> torch.Tensor:
    """KL(teacher || student) of the next-token distributions summed over all tokens, times temperature squared.

    With `ce_weight` the cross-entropy of the labels is added. Both vocabularies' logits exist for a chunk only.
    """
    with torch.no_grad(), teacher(model):
        taught = hidden_states(model, input_ids, position_ids)
    hidden = hidden_states(model, input_ids, position_ids)
    valid = _valid(input_ids, lengths)
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]

    def loss(logits, teacher_hidden, target):
        with torch.no_grad():
            wanted = F.log_softmax(head_logits(model, teacher_hidden).float() / temperature, dim=-1)
        found = F.log_softmax(logits / temperature, dim=-1)
        total = temperature**2 * F.kl_div(found, wanted, reduction="sum", log_target=True)
        if ce_weight:
            total = total + ce_weight * F.cross_entropy(logits, target, reduction="sum", ignore_index=IGNORED)
        return total

    return _chunked(model, loss, hidden[valid], taught[valid], targets[valid])


def transfer_sum(model: TrainedModel, input_ids, lengths, position_ids=None, heads: bool = False) -> torch.Tensor:
    """Per layer the squared distance of Liger's output from softmax's, both on the original model's hidden states.

    Relative to the mean square of softmax's output in the micro-batch, averaged over layers, summed over tokens
    (attention transfer as in LoLCATs, arXiv 2410.10254, made free of scale).

    Args:
        heads: as in LoLCATs: the outputs of the heads, before the output projection, and 1000 times the mean square of
            their difference.
    """
    decoder = model.logits_model().get_decoder()
    attentions = [module for module in decoder.liger_attentions() if module.liger_spec.kind == "liger"]
    seen: dict[int, tuple] = {}
    projected: dict[int, torch.Tensor] = {}

    def keep(module, args, kwargs, output):
        seen[module.layer_idx] = (args, kwargs, output[0])

    def keep_heads(layer, module, args):
        projected[layer] = args[0]

    before = [
        module.output_projection.register_forward_pre_hook(partial(keep_heads, module.layer_idx))
        for module in attentions
        if heads
    ]
    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in attentions]
    try:
        with torch.no_grad(), teacher(model):
            decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        valid = _valid(input_ids, lengths)
        total = torch.zeros((), device=input_ids.device)
        for module in attentions:
            args, kwargs, wanted = seen.pop(module.layer_idx)
            wanted = projected.pop(module.layer_idx) if heads else wanted
            # It runs by itself, outside of the decoder layer that would be computed again.
            again = module.gradient_checkpointing and torch.is_grad_enabled()
            found = checkpoint(module, *args, use_reentrant=False, **kwargs) if again else module(*args, **kwargs)
            found = found[0]
            found = projected.pop(module.layer_idx) if heads else found
            wanted = wanted[valid].float()
            scale = wanted.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
            distance = (found[valid].float() - wanted).square().mean(-1).sum()
            total = total + (MSE_FACTOR * distance if heads else distance / scale)
    finally:
        for hook in (*hooks, *before):
            hook.remove()
    return total / len(attentions)


@contextmanager
def teacher(model: TrainedModel) -> Iterator[None]:
    """The original model: LoRA off, every Liger layer run as softmax attention. The modes are restored."""
    base = model.logits_model()
    modes = [module.liger_mode for module in base.get_decoder().liger_attentions()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            base.set_attention_mode("softmax")
            yield
    finally:
        for module, mode in zip(base.get_decoder().liger_attentions(), modes, strict=True):
            module.liger_mode = mode
        for parameter, wanted in trained:  # PEFT lets gradients reach LoRA again, whether they had or not
            parameter.requires_grad_(wanted)


@contextmanager
def window_dropout(model: TrainedModel, probability: float, rng: Random) -> Iterator[None]:
    """Run randomly chosen Liger layers on the recurrent branch alone, so that it cannot be bypassed.

    The backward pass has to lie within, too: gradient checkpointing computes the layers again there.
    """
    attentions = model.logits_model().get_decoder().liger_attentions() if probability else []
    specs = [(module, module.liger_spec) for module in attentions if module.liger_spec.kind == "liger"]
    for module, spec in specs:
        if rng.random() < probability:
            module.liger_spec = replace(spec, mix=1.0)
    try:
        yield
    finally:
        for module, spec in specs:
            module.liger_spec = spec


def hidden_states(model: TrainedModel, input_ids, position_ids=None) -> torch.Tensor:
    """The decoder's last hidden states. [B, T] -> [B, T, D_model]"""
    decoder = model.logits_model().get_decoder()
    return decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state


def head_logits(model: TrainedModel, hidden) -> torch.Tensor:
    """Logits from hidden states [..., D_model] -> [..., V], with the family's scaling and soft-capping."""
    base = model.logits_model()
    logits = base.get_output_embeddings()(hidden)
    config = base.config
    if scaling := getattr(config, "logits_scaling", None):  # Granite divides
        logits = logits / scaling
    if scale := getattr(config, "logit_scale", None):  # Cohere multiplies
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits


def _chunked(model: TrainedModel, loss: Callable, hidden, *others) -> torch.Tensor:
    """Sum of `loss(logits, *others)` over chunks of tokens; the backward pass computes each chunk's logits again."""
    vocabulary = model.logits_model().get_output_embeddings().weight.shape[0]
    size = max(1, CHUNK_ELEMENTS // vocabulary)

    def part(hidden, *others):
        return loss(head_logits(model, hidden).float(), *others)

    if len(hidden) <= size:
        return part(hidden, *others)
    total = torch.zeros((), device=hidden.device)
    for pieces in zip(*(tensor.split(size) for tensor in (hidden, *others)), strict=True):
        total = total + checkpoint(part, *pieces, use_reentrant=False)
    return total


def _valid(input_ids, lengths) -> torch.Tensor:
    """[B, T] bool: true where there is no padding."""
    return torch.arange(input_ids.shape[1], device=input_ids.device)[None] < lengths[:, None]
