"""Random Stable Diffusion 3 and FLUX pipelines, built in code: the real classes, tiny, without any download."""

import string

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

LETTERS = string.ascii_lowercase


def clip_tokenizer():
    "One token a letter, 16 tokens a prompt."
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=16)


def t5_tokenizer():
    "One token a letter or space."
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5TokenizerFast(vocab=[(piece, 0.0 if i < 3 else -3.0) for i, piece in enumerate(pieces)], extra_ids=0)


def clip_encoder(width, kind=CLIPTextModelWithProjection):
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return kind(config)


def autoencoder(scaling_factor, shift_factor):
    "For 16x16 images."
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def t5_config():
    return T5Config(
        vocab_size=30, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )


def tiny_sd3(dual=False, shift=3.0, seed=0):
    "A pipeline for 16x16 images with random weights; `dual`: dual attention and normed queries and keys, as in SD3.5."
    torch.manual_seed(seed)
    vae = autoencoder(1.5, 0.06)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        **(dict(dual_attention_layers=(0,), qk_norm="rms_norm") if dual else {}),
    )
    return ready(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=vae,
            text_encoder=clip_encoder(8),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_encoder(16),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=T5EncoderModel(t5_config()),
            tokenizer_3=t5_tokenizer(),
        )
    )


def tiny_flux(dynamic=True, guidance=True, seed=0):
    "A pipeline for 16x16 images; `dynamic`: its shift depends on the size, `guidance`: it is told, as in FLUX.1-dev."
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance,
    )
    return ready(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic),
            vae=autoencoder(0.36, 0.12),
            text_encoder=clip_encoder(8, CLIPTextModel),
            tokenizer=clip_tokenizer(),
            text_encoder_2=T5EncoderModel(t5_config()),
            tokenizer_2=t5_tokenizer(),
            transformer=transformer,
        )
    )


def tiny_auraflow(seed=0):
    "A pipeline for 16x16 images, of a kind that the library does not know: with one text encoder."
    torch.manual_seed(seed)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    return ready(
        AuraFlowPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=UMT5EncoderModel(UMT5Config(**t5_config().to_diff_dict())),
            vae=autoencoder(1.5, None),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
    )


def ready(pipeline):
    "For use, not for training: no dropout, no gradients, no progress bar."
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
