"""Tiny models that read tokens. Each call gives new random weights."""

from __future__ import annotations

from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GptOssConfig,
    GptOssForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from tests.families.weights import with_visible_vectors


ENCODER = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
DECODER = {**ENCODER, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}


def bert() -> PreTrainedModel:
    return with_visible_vectors(BertForSequenceClassification(BertConfig(**ENCODER)))


def roberta() -> PreTrainedModel:
    return with_visible_vectors(RobertaForSequenceClassification(RobertaConfig(**ENCODER)))


def distilbert() -> PreTrainedModel:
    config = DistilBertConfig(
        vocab_size=60, dim=24, n_layers=2, n_heads=2, hidden_dim=40, max_position_embeddings=40, num_labels=3
    )
    return with_visible_vectors(DistilBertForSequenceClassification(config))


def albert() -> PreTrainedModel:
    """One layer, called twice."""
    return with_visible_vectors(AlbertForSequenceClassification(AlbertConfig(**ENCODER, embedding_size=16)))


def electra() -> PreTrainedModel:
    return with_visible_vectors(ElectraForSequenceClassification(ElectraConfig(**ENCODER, embedding_size=16)))


def deberta_v2() -> PreTrainedModel:
    """Disentangled attention with projections of positions, and the convolution beside the first layer."""
    config = DebertaV2Config(
        **ENCODER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=False,
        conv_kernel_size=3,
        type_vocab_size=0,
        position_biased_input=False,
    )
    return with_visible_vectors(DebertaV2ForSequenceClassification(config))


def modernbert() -> PreTrainedModel:
    special = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    config = ModernBertConfig(**ENCODER, **special, local_attention=8)
    return with_visible_vectors(ModernBertForSequenceClassification(config))


def gpt2() -> PreTrainedModel:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=2, n_positions=40, num_labels=3, **special)
    return with_visible_vectors(GPT2ForSequenceClassification(config))


def llama() -> PreTrainedModel:
    return with_visible_vectors(LlamaForSequenceClassification(LlamaConfig(**DECODER)))


def mixtral() -> PreTrainedModel:
    """Experts as stacks of (out, in) matrices; the file holds each expert by itself."""
    return with_visible_vectors(MixtralForSequenceClassification(MixtralConfig(**EXPERTS)))


def gpt_oss() -> PreTrainedModel:
    """Experts as stacks of (in, out) matrices, with biases."""
    config = GptOssConfig(**EXPERTS, head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    return with_visible_vectors(GptOssForSequenceClassification(config))


def t5() -> PreTrainedModel:
    """Encoder and decoder; each row of `input_ids` must end in the one token `eos_token_id`."""
    sizes = {"d_model": 24, "d_ff": 40, "num_layers": 2, "num_heads": 2, "d_kv": 12, "vocab_size": 60}
    special = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}
    return with_visible_vectors(T5ForSequenceClassification(T5Config(**sizes, **special, num_labels=3)))


def xlnet() -> PreTrainedModel:
    """Projections are parameters of three axes on the attention itself."""
    config = XLNetConfig(vocab_size=60, d_model=24, n_layer=2, n_head=2, d_inner=40, num_labels=3)
    return with_visible_vectors(XLNetForSequenceClassification(config))
