"""The fields of a `UNet2DModel`'s config.json: diffusers' defaults, and the values that our network has."""

from vdm_jax.interop.faults import absent_or, list_of, number, whole

DEFAULTS = {  # diffusers', for fields that a config.json does not name
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
OURS = {  # what our network is, and cannot be otherwise; the first of each is what is written
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (1,),
    "flip_sin_to_cos": (False,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0,),  # theirs is then a border at the bottom and the right, as ours
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-6,),
    "resnet_time_scale_shift": ("default",),
    "class_embed_type": (None,),
}
WIDEST = 2**16  # channels, or pixels of a side
KINDS = {  # of what OURS leaves open: a test, and what passes it
    "sample_size": (
        lambda v: whole(1, WIDEST)(v) or (list_of(whole(1, WIDEST), 2)(v) and len(v) == 2),
        "the images' side, or [height, width]: write it there",
    ),
    "in_channels": (whole(1, WIDEST), "a number of channels"),
    "out_channels": (whole(1, WIDEST), "a number of channels"),
    "time_embedding_dim": (absent_or(whole(1, 4 * WIDEST)), "null, or four times the first of block_out_channels"),
    "down_block_types": (list_of(lambda v: isinstance(v, str), 16), "a list of names"),
    "up_block_types": (list_of(lambda v: isinstance(v, str), 16), "a list of names"),
    "block_out_channels": (list_of(whole(1, WIDEST), 16), "a list of numbers of channels"),
    "layers_per_block": (whole(1, 100), "1 to 100"),
    "dropout": (lambda v: number(0, 1)(v) and v < 1, "a number in [0, 1)"),
    "attention_head_dim": (absent_or(whole(1, WIDEST)), "null, which is one head of all channels"),
    "norm_num_groups": (whole(1, WIDEST), "a number of groups"),
    "attn_norm_num_groups": (absent_or(whole(1, WIDEST)), "null, or norm_num_groups"),
    "add_attention": (lambda v: isinstance(v, bool), "true or false"),
    "num_class_embeds": (absent_or(whole(2, 2**24)), "null, or 2 and more: the last is no label"),
}
