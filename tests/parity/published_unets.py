"""The published UNets' configs, as diffusers' config.json has them, and their parameter counts."""

SD15 = dict(
    sample_size=64,
    cross_attention_dim=768,
    attention_head_dim=8,
)
SD21 = dict(
    sample_size=64,
    cross_attention_dim=1024,
    attention_head_dim=(5, 10, 20, 20),
    use_linear_projection=True,
)
SDXL = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
REFINER = SDXL | dict(
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=(
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=1280,
    attention_head_dim=(6, 12, 24, 24),
    transformer_layers_per_block=4,
    projection_class_embeddings_input_dim=2560,
)
COUNTS = {
    "SD15": (SD15, 859_520_964),
    "SD21": (SD21, 865_910_724),
    "SDXL": (SDXL, 2_567_463_684),
    "REFINER": (REFINER, None),
    "SD15_LCM": (SD15 | dict(time_cond_proj_dim=256), None),
}
