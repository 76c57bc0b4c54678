"""Qwen3, linearized by liger: https://arxiv.org/abs/2503.01496. Written by `liger convert`; loads without liger."""

from transformers import Qwen3Config, Qwen3ForCausalLM

from .liger_model import LigerForCausalLM, keep_weight_names

keep_weight_names("qwen3", "liger_qwen3")


class LigerQwen3Config(Qwen3Config):
    model_type = "liger_qwen3"


class LigerQwen3ForCausalLM(LigerForCausalLM, Qwen3ForCausalLM):
    config_class = LigerQwen3Config
