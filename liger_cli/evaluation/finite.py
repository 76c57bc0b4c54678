"""Where NaN or infinity came from: the first part of a model whose output is not finite, found by running it again."""

from collections.abc import Callable

from liger_cli.templates.liger_extras import NAMES


def first_non_finite(model, run: Callable[[], object]) -> str | None:
    """Run once more, without gradients, and name the first module in the order of computation with such an output.

    Args:
        model: a causal language model of transformers, Liger or not, without PEFT's wrapper.
        run: runs it on the batch in question.
    Returns:
        Words such as `layer 3 (self_attn)`, with a note where weights are not finite, or None where all is finite now.
    """
    import torch

    found: list[tuple[str, object]] = []

    def watch(name: str):
        def hook(module, _inputs, output):
            if not found and not all(torch.isfinite(x).all() for x in _floats(output)):
                found.append((name, module))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in _parts(model)]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return None
    name, module = found[0]
    broken = [key for key, weight in module.named_parameters() if not torch.isfinite(weight).all()]
    broken.sort(key=lambda key: key.rpartition(".")[2] in NAMES)  # what was fitted on NaN is none of the causes
    return f"{name}, whose {broken[0]} is not finite either" if broken else name


def _parts(model):
    """(name, module): the embeddings, what each layer is made of, the layers, the last norm and the head."""
    decoder = model.get_decoder()
    yield "the embeddings", model.get_input_embeddings()
    for index, layer in enumerate(decoder.layers):
        for name, child in layer.named_children():
            yield f"layer {index} ({name})", child
        yield f"layer {index}", layer
    yield "the model's end", decoder
    yield "the output layer", model.get_output_embeddings()


def _floats(output):
    """Every floating-point tensor in a module's output."""
    import torch

    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return [x for one in output for x in _floats(one)]
    return []
