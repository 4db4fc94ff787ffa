"""Tiny random models of five architectures for the tests that run real clients. Made here, float32, nothing downloaded.

Hidden size 64, two layers (T5: two on each side), vocabulary 128, inputs of up to 64 tokens.  Each builder draws its
weights from a seed, so two calls give equal models; all are in eval mode.  The vectors that an initialisation leaves at
zero or one (biases, norms) are drawn too: a bias that is lost or a transposed weight shows in the logits.  As in large
language models one feature of every normalised input is an outlier, beyond the usual threshold of LLM.int8(), 6.0.
"""

import os
import re

import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: nothing here needs the network

import transformers

SEED = 20
VOCABULARY = 128
HIDDEN = 64
OUTLIER, FACTOR = 5, 8.0
# Ids that no model ends on: greedy decoding runs its full length
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def _build(kind, config, seed):
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # T5 does not divide attention scores by the root of the head size: its queries are that much smaller.
                nn.init.normal_(parameter, std=0.025 if name.endswith("Attention.q.weight") else 0.1)
                continue
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if re.search(r"\.\d+\..*(norm|ln_\d)\.weight$", name) and parameter.numel() == HIDDEN:
                parameter[OUTLIER] *= FACTOR
    model.generation_config.eos_token_id = None
    return model.float().eval()


def llama(seed=SEED):
    """LlamaForCausalLM: grouped-query attention with biases, 14 linear layers and an lm_head of its own."""
    config = transformers.LlamaConfig(
        **_TOKENS,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
    )
    return _build("LlamaForCausalLM", config, seed)


def gpt2(seed=SEED):
    """GPT2LMHeadModel: 8 Conv1D layers, whose weight is [in, out], and an lm_head tied to the embedding."""
    config = transformers.GPT2Config(**_TOKENS, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64)
    return _build("GPT2LMHeadModel", config, seed)


def opt(seed=SEED):
    """OPTForCausalLM: 12 linear layers with biases, and an lm_head tied to the embedding."""
    config = transformers.OPTConfig(
        **_TOKENS,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
    )
    return _build("OPTForCausalLM", config, seed)


def t5(seed=SEED):
    """T5ForConditionalGeneration: encoder and decoder of two layers, gated feed-forward, lm_head tied to the embedding.

    32 linear layers, and four `wo`, which stay in float32 when the model is in float16.
    """
    config = transformers.T5Config(
        **_TOKENS,
        d_model=HIDDEN,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return _build("T5ForConditionalGeneration", config, seed)


def qwen3_moe(seed=SEED):
    """Qwen3MoeForCausalLM: 8 linear layers; 4 experts a layer, fused into gate_up_proj and down_proj [4, ., .]."""
    config = transformers.Qwen3MoeConfig(
        **_TOKENS,
        hidden_size=HIDDEN,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return _build("Qwen3MoeForCausalLM", config, seed)


def save(model, folder):
    """Write the model as from_pretrained() reads it. Returns folder."""
    model.save_pretrained(folder)
    return folder
