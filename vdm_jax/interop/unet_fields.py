"""The fields of a `UNet2DModel`'s config.json: diffusers' defaults, and the values that our network supports."""

from vdm_jax.interop.config_checks import is_int, is_list_of, is_null_or, is_number

__all__ = ["DIFFUSERS_DEFAULTS", "FIELD_CHECKS", "FIXED_FIELDS"]

DIFFUSERS_DEFAULTS = {  # for fields missing from config.json
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
FIXED_FIELDS = {  # the only values that our network supports; the first one is written
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (1,),
    "flip_sin_to_cos": (False,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0,),  # diffusers then pads at the bottom and the right, as we do
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-6,),
    "resnet_time_scale_shift": ("default",),
    "class_embed_type": (None,),
}
MAX_SIZE = 2**16  # of channels, or of an image's side in pixels
FIELD_CHECKS = {  # for all other fields: the check of a value, and a description of valid ones
    "sample_size": (
        lambda v: is_int(1, MAX_SIZE)(v) or (is_list_of(is_int(1, MAX_SIZE), 2)(v) and len(v) == 2),
        "the images' side, or [height, width]: add it to config.json",
    ),
    "in_channels": (is_int(1, MAX_SIZE), "a number of channels"),
    "out_channels": (is_int(1, MAX_SIZE), "a number of channels"),
    "time_embedding_dim": (
        is_null_or(is_int(1, 4 * MAX_SIZE)),
        "null, or four times the first of block_out_channels",
    ),
    "down_block_types": (is_list_of(lambda v: isinstance(v, str), 16), "a list of names"),
    "up_block_types": (is_list_of(lambda v: isinstance(v, str), 16), "a list of names"),
    "block_out_channels": (is_list_of(is_int(1, MAX_SIZE), 16), "a list of numbers of channels"),
    "layers_per_block": (is_int(1, 100), "1 to 100"),
    "dropout": (lambda v: is_number(0, 1)(v) and v < 1, "a number in [0, 1)"),
    "attention_head_dim": (is_null_or(is_int(1, MAX_SIZE)), "null, which is one head of all channels"),
    "norm_num_groups": (is_int(1, MAX_SIZE), "a number of groups"),
    "attn_norm_num_groups": (is_null_or(is_int(1, MAX_SIZE)), "null, or norm_num_groups"),
    "add_attention": (lambda v: isinstance(v, bool), "true or false"),
    "num_class_embeds": (
        is_null_or(is_int(2, 2**24)),
        'null, or 2 and more: the last class means "no label"',
    ),
}
