"""liger: turn softmax-attention language models into gated linear recurrent ones (arXiv 2503.01496).

The rooms, from the ground up; a module imports only from its own and from lower ones:

    system       errors, signals, output that appears whole, untrusted files, words and tables on a terminal
    checkpoint   reading, checking and writing model folders and adapters: families, weights, model code, the hub
    conversion   the plan of a conversion, its edits, and the folder that is written
    shipped      the small base that comes along, its text and its recall probes
    evaluation   a model beside its base: perplexity, agreement, recall, harness tasks; results, tables, plots, card
    calibration  what is measured on a little text before any training: fitted scores and states, kept tokens by head,
                 softmax layers and heads
    training     recipes, data, objectives and the run that makes an adapter
    benchmark    time and memory of a model and of its base
    commands     one module a command of `liger`: options, help, and what it does with the rooms below

`templates` is the model code that goes into every folder, and that liger runs itself.
"""

__version__ = "0.1.0"

PUBLIC = {
    "convert": ("ConvertOptions", "convert"),
    "finetune": ("FinetuneOptions", "finetune"),
    "merge": ("MergeOptions", "merge"),
    "evaluate": ("EvaluateOptions", "evaluate"),
    "bench": ("BenchOptions", "bench"),
}


def __getattr__(name: str):
    """The functions that are the product; what they need is imported when they are asked for, and run."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    options, module = PUBLIC[name]
    home = f"{__name__}.commands"
    described = getattr(import_module(f"{home}.{module}_options"), options)
    made = import_module(f"{home}.options").function(described, f"{home}.{module}")
    made.__name__ = made.__qualname__ = name
    made.__module__ = __name__
    globals()[name] = made
    return made
