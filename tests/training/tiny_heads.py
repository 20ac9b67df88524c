"""Tiny models with a head for tokens, for the next token and for sound, and batches for them."""

from functools import wraps

import tiny_models
import torch
from tiny_models import LABELS, LENGTH, PAD, VOCABULARY, Examples
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForTokenClassification,
    ASTConfig,
    ASTForAudioClassification,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)


SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "num_labels": LABELS}
PLACES = {"max_position_embeddings": 16}
SAMPLES = 60


def varied(build):
    """Models with gains of their own: with those of a new one every row that leaves a normalisation is as long."""

    @wraps(build)
    def with_gains(*args, **values):
        torch.manual_seed(0)
        model = build(*args, **values)
        for module in model.modules():
            if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter):
                nn.init.uniform_(module.weight, 0.2, 2.0)
        return model

    return with_gains


bert, roberta, gpt2 = varied(tiny_models.bert), varied(tiny_models.roberta), varied(tiny_models.gpt2)
vit, resnet = varied(tiny_models.vit), varied(tiny_models.resnet)


@varied
def _build(model_class, config_class, **values):
    return model_class(config_class(**values))


def bert_tokens(**overrides):
    return _build(BertForTokenClassification, BertConfig, **SIZES, **NO_DROPOUT, **TOKENS, **PLACES, **overrides)


def bert_masked(**overrides):
    return _build(BertForMaskedLM, BertConfig, **SIZES, **NO_DROPOUT, **TOKENS, **PLACES, **overrides)


def albert_tokens():
    sizes = {**SIZES, "embedding_size": 8}
    return _build(AlbertForTokenClassification, AlbertConfig, **sizes, **NO_DROPOUT, **TOKENS, **PLACES)


def gpt2_next():
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 1}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return _build(GPT2LMHeadModel, GPT2Config, **sizes, **dropout, **TOKENS)


def _llama(model_class, **overrides):
    return _build(model_class, LlamaConfig, **SIZES, **TOKENS, **PLACES, num_key_value_heads=1, **overrides)


def llama_next(**overrides):
    return _llama(LlamaForCausalLM, **overrides)


def llama_sequences(**overrides):
    return _llama(LlamaForSequenceClassification, **overrides)


def llama_tokens(**overrides):
    return _llama(LlamaForTokenClassification, **overrides)


def cohere_next():
    """Multiplies what comes out of the head by 1/16."""
    return _build(CohereForCausalLM, CohereConfig, **SIZES, **TOKENS, **PLACES, num_key_value_heads=1)


def _bart_sizes():
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    return {**sizes, "d_model": 8, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "dropout": 0.0}


def bart_same():
    """A causal language model whose loss does not shift the labels."""
    return _build(BartForCausalLM, BartConfig, **_bart_sizes(), **TOKENS, **PLACES)


def t5():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return _build(T5ForConditionalGeneration, T5Config, **sizes, **TOKENS, decoder_start_token_id=1)


def _wav2vec2(model_class, **overrides):
    convolutions = {"conv_dim": [6, 6], "conv_kernel": [4, 2], "conv_stride": [3, 2], "feat_extract_norm": "layer"}
    places = {"num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 5}
    rates = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
    dropout = {**dict.fromkeys(rates, 0.0), "layerdrop": 0.0, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    values = {**SIZES, **convolutions, **places, **dropout, "num_labels": LABELS, **overrides}
    return _build(model_class, Wav2Vec2Config, **values)


def wav2vec2(**overrides):
    return _wav2vec2(Wav2Vec2ForSequenceClassification, **overrides)


def wav2vec2_frames():
    return _wav2vec2(Wav2Vec2ForAudioFrameClassification)


def ast():
    patches = {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8}
    return _build(ASTForAudioClassification, ASTConfig, **SIZES, **NO_DROPOUT, **patches, num_labels=LABELS)


def whisper():
    sizes = {**_bart_sizes(), "num_mel_bins": 4, "max_source_positions": 10, "max_target_positions": 16}
    extra = {"classifier_proj_size": 6, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    return _build(WhisperForAudioClassification, WhisperConfig, **sizes, **TOKENS, **extra)


EXAMPLES = [bert, roberta, gpt2, llama_sequences, vit, resnet, wav2vec2, ast, whisper]
FOR_TOKENS = [
    bert_tokens, albert_tokens, llama_tokens, bert_masked, t5, gpt2_next, llama_next, cohere_next, bart_same,
]  # fmt: skip
SHIFTING = [gpt2_next, llama_next, cohere_next]


def batch_for(model, count=4, seed=0):
    """Examples with labels for the model's loss: texts are padded, and some of their tokens do not count."""
    generator = torch.Generator().manual_seed(seed)
    name = type(model).__name__
    if name.startswith("AST"):
        inputs = {"input_values": torch.randn(count, 16, 8, generator=generator)}
    elif name.startswith("Whisper"):
        inputs = {"input_features": torch.randn(count, 4, 20, generator=generator)}
    elif name.startswith("Wav2Vec2"):
        lengths = torch.randint(30, SAMPLES + 1, (count, 1), generator=generator)
        mask = (torch.arange(SAMPLES) < lengths).long()
        inputs = {"input_values": torch.randn(count, SAMPLES, generator=generator), "attention_mask": mask}
    else:
        batch = Examples(model, count, seed).batch()
        if name.endswith(("LM", "LMHeadModel", "TokenClassification", "ConditionalGeneration")):
            batch["labels"] = token_labels(model, batch["attention_mask"], generator)
        return batch
    return {**inputs, "labels": torch.randint(0, LABELS, (count,), generator=generator)}


def token_labels(model, mask, generator):
    classes = LABELS if type(model).__name__.endswith("TokenClassification") else VOCABULARY
    labels = torch.randint(0, classes, (len(mask), LENGTH), generator=generator)
    some = torch.rand(len(mask), LENGTH, generator=generator) < 0.7
    return labels.masked_fill((mask == 0) | ~some, -100)
