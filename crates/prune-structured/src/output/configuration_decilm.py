"""Config of a Nemotron-NAS checkpoint: a Llama config whose block_configs give each layer its widths."""

from types import SimpleNamespace

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [
            SimpleNamespace(attention=SimpleNamespace(**block["attention"]), ffn=SimpleNamespace(**block["ffn"]))
            for block in block_configs or []
        ]

    def to_dict(self):
        values = super().to_dict()
        values["block_configs"] = [
            {"attention": vars(block.attention), "ffn": vars(block.ffn)} for block in self.block_configs
        ]
        return values
