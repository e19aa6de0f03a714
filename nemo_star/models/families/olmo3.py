"""OLMo 3: OLMo 2 with three windowed layers to one that sees everything; only the latter are stretched."""

from __future__ import annotations

from functools import partial
from typing import Any

from nemo_star.models.families import olmo2
from nemo_star.models.families.decoder import decoder_weights
from nemo_star.models.families.family import Family, Values
from nemo_star.models.families.layers import WINDOW_KEYS, read_windows
from nemo_star.models.families.rope import full_group, windowed_rotary_base


def _settings(values: Values) -> dict[str, Any]:
    base = windowed_rotary_base(values, values["rope_theta"])
    return {
        **olmo2.settings(values),
        **read_windows(values, lambda layer: (layer + 1) % 4 != 0, rotary_base=base),
    }


FAMILY = Family(
    "Olmo3ForCausalLM",
    partial(decoder_weights, norms=olmo2.NORMS),
    _settings,
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 2048, "sliding_window": 4096},
    rope=full_group,
    read=WINDOW_KEYS | {"attention_bias"},
)
