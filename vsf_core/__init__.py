"""Value Sign Flip (VSF, arXiv 2508.10931): a negative prompt inside one attention call.

The method in one line (the paper's Eq. 7-9), for an image query q, positive keys and values K+, V+ and negative ones
K-, V-::

    Z = W Z+  -  alpha (1 - W) Z-      W = sigmoid(lse+ - lse-)      lse- taken from  q K-^T / sqrt(d) - beta

where ``Z+``/``lse+`` are the ordinary attention and its log-sum-exp over the positive keys, and ``Z-``/``lse-`` over
the negative ones. This package is torch only: it knows nothing of ComfyUI and is usable from a plain script.
"""

from .attention import NegativeTerms, beside_plain
from .attention_map import LAYERS, AttentionRecord, layer_of
from .backends import WAYS, Attention, AttentionBackend, LSEAttention, fused_attention, lse_attention
from .embeddings import content_length, extrapolate, null_embedding
from .engines import TokenIndex, attend_gathered, attend_spread
from .layout import TokenLayout, aligned, padding_mask, unless_all, zero_mask
from .methods import NAG, NASA, ONG, VSF, Guidance, Method, attend_cross, attend_joint, way_of
from .reference import cross_attention_reference, joint_attention_reference, joint_mask
