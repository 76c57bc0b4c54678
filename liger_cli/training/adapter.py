"""The model that a fine-tuning run trains: a converted one with a fresh LoRA adapter."""

from liger_cli.training.plan import Base, layer_of, own_device, trained_extras
from liger_cli.training.recipes import Recipe


def adapted_model(base: Base, recipe: Recipe, modules: dict, dtype: str, sharded: bool = False):
    """The model with a fresh adapter on `modules`, ready to be trained by the recipe: an `objectives.TrainedModel`.

    It is on the devices that this process trains on, or on the CPU where its weights are going to be sharded.
    """
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from liger_cli.checkpoint.model_code import load_model
    from liger_cli.training.extras import set_trained
    from liger_cli.training.objectives import TrainedModel

    torch.manual_seed(recipe.seed)
    options = {}
    if recipe.load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    model = load_model(base.folder, "cpu" if sharded else own_device(), dtype=getattr(torch, dtype), **options)
    model.config.use_cache = False
    model.set_attention_mode(recipe.attention)
    if recipe.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=sorted({name.rpartition(".")[2] for name in modules}),
        layers_to_transform=sorted({layer_of(name) for name in modules}),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base.folder)
    adapted.__class__ = TrainedModel
    adapted.train_extra = bool(trained_extras(base, recipe))
    if adapted.train_extra:
        # What any stage trains has to be the optimizer's from the start; each stage then switches the rest off.
        ways = {stage.train for stage in recipe.stages}
        set_trained(adapted, ways.pop() if len(ways) == 1 else "both")
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted


def sharded_classes(adapted, recipe: Recipe) -> tuple[str, ...]:
    """Class names of the modules that FSDP gathers at a time: layers, and attentions where they run by themselves."""
    layers = adapted.logits_model().get_decoder().layers
    classes = {type(layer).__name__ for layer in layers}
    if any(stage.objective.startswith("transfer") for stage in recipe.stages):
        classes |= {type(layer.self_attn).__name__ for layer in layers}
    return tuple(sorted(classes))
