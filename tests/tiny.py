"""Random pipelines of each family, built in code: the real classes, tiny, without any download."""

import string

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
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


# Of a small autoencoder.
BLOCKS = dict(
    block_out_channels=(8, 8),
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    layers_per_block=1,
    norm_num_groups=4,
    latent_channels=4,
    sample_size=16,
    mid_block_add_attention=False,
)


def autoencoder(scaling_factor, shift_factor):
    "For 16x16 images."
    return AutoencoderKL(
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **BLOCKS,
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


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (  # what its template says before the prompt: 34 tokens, one a word
    "system Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background user assistant"
)


def qwen_tokenizer():
    "One token a letter, but one for each word of Qwen-Image's template, as the real one has it."
    words = [QWEN.split()[0], "user", "assistant", "Describe", *(f"Ġ{word.strip(',')}" for word in QWEN.split()[2:-2])]
    merges = [(word[:i], word[i]) for word in dict.fromkeys(words) for i in range(1, len(word))]
    merges = [*dict.fromkeys(merges)]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges), *specials]
    return Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))},
        merges=merges,
        chat_template=CHAT,
        extra_special_tokens=specials[1:],
    )


def tiny_flux2(distilled=False, seed=0):
    "FLUX.2 klein for 16x16 images, whose text encoder has the 27 layers that the pipeline reads."
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    width = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    encoder = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=27, max_position_embeddings=64, **width)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(**BLOCKS)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return ready(
        Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae,
            text_encoder=Qwen3ForCausalLM(encoder),
            tokenizer=tokenizer,
            transformer=transformer,
            is_distilled=distilled,
        )
    )


def tiny_qwen(seed=0):
    "Qwen-Image for 16x16 images, with the settings of the real scheduler."
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2]),
    )
    vision = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=16)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.3, -0.2, 0.1, 0.0],
        latents_std=[1.5, 0.8, 1.1, 2.0],
    )
    return ready(
        QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
            ),
            vae=vae,
            text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
            tokenizer=tokenizer,
            transformer=transformer,
        )
    )


def text_config(kind, tokenizer):
    "Of a small language model."
    return kind(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


def tiny_zimage(dynamic=False, seed=0):
    "Z-Image for 16x16 images."
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 32, 32],
    )
    return ready(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
            vae=autoencoder(0.36, 0.12),
            text_encoder=Qwen3Model(text_config(Qwen3Config, tokenizer)),
            tokenizer=tokenizer,
            transformer=transformer,
        )
    )


def tiny_sana(seed=0):
    "SANA for 32x32 images, with the real scheduler."
    torch.manual_seed(seed)
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    tokenizer = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    stages = dict(block_types="ResBlock", block_out_channels=[8] * 4, layers_per_block=[1] * 4)
    stages |= dict(qkv_multiscales=[()] * 4)
    halves = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in stages.items()}
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=4,
    )
    return ready(
        SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=Gemma2Model(text_config(Gemma2Config, tokenizer)),
            vae=AutoencoderDC(latent_channels=4, scaling_factor=0.41, **halves),
            transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(
                use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
            ),
        )
    )


def tiny_wan(expand_timesteps=False, seed=0):
    "Wan for videos of 16x16 pixels, with the real scheduler; `expand_timesteps`: as Wan 2.2's small one."
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        scale_factor_temporal=2,
        scale_factor_spatial=4,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.8, 1.0, 1.2, 1.5],
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return ready(
        WanPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=UMT5EncoderModel(UMT5Config(**t5_config().to_diff_dict())),
            vae=vae,
            transformer=transformer,
            scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
            expand_timesteps=expand_timesteps,
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
