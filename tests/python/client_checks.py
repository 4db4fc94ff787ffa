"""What the tests of real clients do with a model: load, run, take its quantised layers apart, save, reload."""

import copy
import json
import os

import torch
import transformers
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from layer_samples import check_same_state

transformers.utils.logging.disable_progress_bar()

IDS = torch.tensor([[3, 17, 5, 99, 7, 31], [120, 64, 11, 12, 45, 2]])
NEW_TOKENS = 8
# Bytes of a shard: less than any layer has with its statistics, so what belongs together lies in several files
SHARD = 1100


def load(folder, options=None, **more):
    """from_pretrained() of the class that the folder's config names; nothing may be missing or left over."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if options is not None:
        more["quantization_config"] = transformers.BitsAndBytesConfig(**options)
    cls = getattr(transformers, config.architectures[0])
    model, info = cls.from_pretrained(folder, output_loading_info=True, **{"dtype": torch.float32, **more})
    assert not any(info.values()), info
    return model


def logits(model, device="cpu"):
    """float32 [2, 6, vocabulary] on the CPU. device: where the model takes its input."""
    ids = IDS.to(device)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    with torch.no_grad():
        return model(**inputs).logits.float().cpu()


def greedy(model, use_cache=True):
    """(tokens [2, .], scores of each new token [NEW_TOKENS, 2, vocabulary])"""
    result = model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert (getattr(result, "past_key_values", None) is not None) == use_cache
    return result.sequences, torch.stack(result.scores)


def least_gap(scores):
    """By how much the best token leads the second: less error than half of it cannot change what is decoded."""
    best = scores.topk(2, -1).values
    return (best[..., 0] - best[..., 1]).min().item()


def relative(a, b):
    """|a - b| / |b|"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def quantised_layers(model):
    """{name: layer} of the 4-bit and 8-bit linear layers."""
    return {name: each for name, each in model.named_modules() if isinstance(each, (Linear4bit, Linear8bitLt))}


def float_layers(model):
    """{name: layer} of nn.Linear and Conv1D."""
    return {name: each for name, each in model.named_modules() if isinstance(each, (torch.nn.Linear, Conv1D))}


def dequantised(layer):
    """The weight that a quantised layer stands for, float32 [out, in]."""
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)


def out_in(layer):
    """The weight of a float layer as [out, in]; Conv1D has it the other way round."""
    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data


def twin_of(model, plain):
    """`plain`, the float model, with the weights that the quantised layers of `model` stand for."""
    twin = copy.deepcopy(plain)
    for name, layer in quantised_layers(model).items():
        out_in(twin.get_submodule(name)).copy_(dequantised(layer))
    return twin


def files_of(folder):
    """{file of tensors: its keys}"""
    result = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            with safe_open(folder / name, "pt") as file:
                result[name] = set(file.keys())
    return result


def check_saved(folder, model, sharded):
    """The files of `folder` hold the state of `model`, in one file, or in shards with an index."""
    files = files_of(folder)
    stored, state = set().union(*files.values()), set(model.state_dict())
    if model._weight_conversions:  # float experts, which Transformers takes apart when it saves
        stored, state = ({key for key in keys if ".experts." not in key} for keys in (stored, state))
    assert stored <= state
    assert state - stored <= set(model.all_tied_weights_keys)
    if not sharded:
        assert list(files) == ["model.safetensors"]
        return
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {key: file for file, keys in files.items() for key in keys}
    assert len(files) >= 2
    for name in quantised_layers(model):
        assert len({file for key, file in index.items() if key.startswith(f"{name}.")}) >= 2, name


def check_reload(model, folder, sharded):
    """Save, reload: config, every byte of the state, and the logits are the same. Returns the reloaded model."""
    model.save_pretrained(folder, **({"max_shard_size": SHARD} if sharded else {}))
    check_saved(folder, model, sharded)
    again = load(folder)
    check_same_state(again, model)
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    assert {k: type(v) for k, v in again.named_parameters()} == {k: type(v) for k, v in model.named_parameters()}
    assert torch.equal(logits(again), logits(model))
    return again
