"""Tiny models that read sound, as samples or as spectrograms. Each call gives new random weights."""

from __future__ import annotations

from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForAudioClassification,
)

from tests.families.weights import with_visible_vectors


TRANSFORMER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}


def wav2vec2() -> PreTrainedModel:
    """The positional convolution is grouped and carries torch's weight norm, over the axis of the kernel."""
    config = Wav2Vec2Config(
        **TRANSFORMER,
        vocab_size=60,
        conv_dim=[8, 8],
        conv_stride=[5, 2],
        conv_kernel=[10, 3],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        num_labels=4,
    )
    return with_visible_vectors(Wav2Vec2ForSequenceClassification(config))


def ast() -> PreTrainedModel:
    """Overlapping patches of a spectrogram."""
    config = ASTConfig(
        **TRANSFORMER,
        patch_size=4,
        max_length=24,
        num_mel_bins=16,
        frequency_stride=3,
        time_stride=4,
        num_labels=4,
    )
    return with_visible_vectors(ASTForAudioClassification(config))


def whisper() -> PreTrainedModel:
    """The encoder alone, with a weighted sum of its layers."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(
        vocab_size=60,
        d_model=24,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=40,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=40,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=10,
        classifier_proj_size=16,
        use_weighted_layer_sum=True,
        num_labels=4,
        **special,
    )
    return with_visible_vectors(WhisperForAudioClassification(config))
