"""Tiny classifiers of each kind, built from configurations, and batches for them."""

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)


VOCABULARY, PAD, LABELS, LENGTH = 40, 0, 3, 7


def bert(**overrides):
    return _text(BertForSequenceClassification, BertConfig, max_position_embeddings=16, **overrides)


def roberta(**overrides):
    return _text(RobertaForSequenceClassification, RobertaConfig, max_position_embeddings=16, **overrides)


def gpt2(**overrides):
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=8, n_layer=2, n_head=2, n_positions=16, vocab_size=VOCABULARY, num_labels=LABELS, pad_token_id=PAD,
        bos_token_id=1, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **overrides,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config)


def vit(**overrides):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    values = {**sizes, **dropout, "image_size": 8, "patch_size": 4, "num_labels": LABELS, **overrides}
    return ViTForImageClassification(ViTConfig(**values))


def resnet(**overrides):
    torch.manual_seed(0)
    sizes = {
        "embedding_size": 4,
        "hidden_sizes": [4, 6],
        "depths": [1, 1],
        "layer_type": "basic",
        "num_labels": LABELS,
    }
    return ResNetForImageClassification(ResNetConfig(**{**sizes, **overrides}))


def _text(model_class, config_class, **overrides):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "num_labels": LABELS}
    return model_class(config_class(**{**sizes, **dropout, **tokens, **overrides}))


class Examples(Dataset):
    """`count` labelled examples for a model, the same ones for the same seed; texts are padded on the right."""

    def __init__(self, model, count=8, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.columns = {"labels": torch.randint(0, LABELS, (count,), generator=generator)}
        if model.main_input_name == "pixel_values":
            self.columns["pixel_values"] = torch.randn(count, 3, 8, 8, generator=generator)
        else:
            lengths = torch.randint(2, LENGTH + 1, (count, 1), generator=generator)
            mask = (torch.arange(LENGTH) < lengths).long()
            ids = torch.randint(3, VOCABULARY, (count, LENGTH), generator=generator)
            self.columns |= {"input_ids": ids * mask + PAD * (1 - mask), "attention_mask": mask}

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}

    def batch(self):
        return dict(self.columns)
