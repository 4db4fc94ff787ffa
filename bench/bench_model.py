"""A Llama-shaped model through Transformers, its linears in NF4 or LLM.int8(), beside the same model in 16 bits.

The model is made here, of random numbers, saved, and loaded once per format: a quantised one and the 16-bit model of
the same activations (NF4 and bf16, int8 and f16) are in memory together, and their runs alternate.  As in trained
models, 8 channels of the normalised activations are large, so that LLM.int8() finds outliers in 0.2 % of the columns.
Printed are: tokens per second of generate() and of a decoding step in a CUDA graph (static cache), the prefill of 2048
tokens, memory after loading, and speed and peak memory of a training step of LoRA adapters.  Exit status 1 if a line
misses what it must reach.
Usage: python bench/bench_model.py [--json FILE] [--only decode,prefill,train] [--formats nf4,int8]
       [--hidden N] [--layers N] [--tokens N] [--compile]
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import tempfile
import time

import torch
import transformers

PARTS = ("decode", "prefill", "train")
FORMATS = {  # name: (dtype, BitsAndBytesConfig's arguments)
    "nf4": (
        torch.bfloat16,
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.bfloat16,
            "bnb_4bit_use_double_quant": True,
        },
    ),
    "int8": (torch.float16, {"load_in_8bit": True}),
}
# (format, line): the least ratio of its speed to the 16-bit model's.
MUSTS = {
    ("nf4", "graph 1"): 1.5,
    ("nf4", "graph 8"): 1.5,
    ("nf4", "eager 1"): 1.0,
    ("nf4", "eager 8"): 1.0,
    ("int8", "prefill"): 1.3,
    ("int8", "graph 1"): 1.0,
}
PROMPT, PREFILL, TRAINED = 16, 2048, 1024
LARGE, LARGER = 8, 20.0  # channels, and by how much


def config_of(arguments):
    hidden = arguments.hidden
    heads = max(hidden // 128, 2)
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        vocab_size=32000,
        max_position_embeddings=4096,
        pad_token_id=0,
        initializer_range=0.45 * hidden**-0.5,
    )


@torch.no_grad()
def save_model(config, folder, device):
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(previous)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[:: config.hidden_size // LARGE] = LARGER
    model.generation_config.eos_token_id = None  # every run makes as many tokens
    model.save_pretrained(folder)


def allocated(device):
    gc.collect()
    return torch.cuda.memory_allocated() / 1e6 if device != "cpu" else 0.0


def load_model(folder, dtype, quantised, device):
    """The model, and the MB that it takes: of the card, or those of parameters and buffers on the CPU."""
    extra = {"quantization_config": transformers.BitsAndBytesConfig(**quantised)} if quantised else {}
    before = allocated(device)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, **extra)
    if device == "cpu":
        return model.eval(), model.get_memory_footprint() / 1e6
    return model.eval(), allocated(device) - before


def synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize()


def seconds_of(runs, device, samples):
    """Median seconds of each run, after two; the runs alternate."""
    times = [[] for _ in runs]
    for i in range(samples + 2):
        for run, own in zip(runs, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if i >= 2:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def graph_of(run):
    """`run` captured, as a function that replays it, and keeps what `run` works on."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return lambda run=run: graph.replay()


def ids(batch, length, device):
    return torch.randint(1, 32000, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)


def generation(model, prompt, tokens):
    def run():
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)

    return run


def decoding(model, prompt, device, compiled):
    """A step behind a prompt, in a graph where there is a card."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=256)
    model(prompt, past_key_values=cache, cache_position=torch.arange(PROMPT, device=device))
    token, place = ids(prompt.shape[0], 1, device), torch.tensor([PROMPT], device=device)
    forward = torch.compile(model.forward) if compiled else model.forward

    def step():
        forward(token, past_key_values=cache, cache_position=place, position_ids=place[None])

    return step if device == "cpu" else graph_of(step)


@torch.no_grad()
def decode_lines(models, device, arguments):
    """{line: tokens per second of each model}."""
    lines, tokens = {}, arguments.tokens
    for batch in (1, 8):
        prompt = ids(batch, PROMPT, device)
        runs = [generation(model, prompt, tokens) for model in models]
        lines[f"eager {batch}"] = [batch * tokens / s for s in seconds_of(runs, device, 5)]
        runs = [decoding(model, prompt, device, arguments.compile) for model in models]
        lines[f"graph {batch}"] = [batch / s for s in seconds_of(runs, device, 30)]
    return lines


@torch.no_grad()
def prefill_lines(models, device):
    prompt = ids(1, PREFILL, device)
    runs = [lambda model=model: model(prompt, use_cache=False) for model in models]
    return {"prefill": [PREFILL / s for s in seconds_of(runs, device, 7)]}


def training(model, device):
    """A step of LoRA adapters on every linear of the layers."""
    import peft

    adapters = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapters)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = ids(1, TRAINED, device)

    def step():
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def peak_of(step, device):
    """MB of the card that a step takes beside what is there before it."""
    before = allocated(device)
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e6 - before


def train_lines(models, sizes, device):
    steps = [training(model, device) for model in models]
    lines = {"train": [TRAINED / s for s in seconds_of(steps, device, 5)]}
    if device != "cpu":
        peaks = [peak_of(step, device) for step in steps]
        lines["train peak MB"] = [size + peak for size, peak in zip(sizes, peaks, strict=True)]
    return lines


def measure(folder, name, device, arguments):
    """{line: [of the format, of its 16-bit model]}"""
    dtype, quantised = FORMATS[name]
    loaded = [load_model(folder, dtype, each, device) for each in (quantised, None)]
    models, sizes = [model for model, _ in loaded], [size for _, size in loaded]
    lines = {"memory MB": sizes}
    for part in arguments.only.split(","):
        if part == "decode":
            lines |= decode_lines(models, device, arguments)
        elif part == "prefill":
            lines |= prefill_lines(models, device)
        elif part == "train" and name == "nf4":
            lines |= train_lines(models, sizes, device)
    return lines


def report(found):
    """Print every line, and its ratio to the model of 16 bits; returns the lines that miss."""
    missed = []
    print(f"{'format':8} {'line':14} {'value':>12} {'16 bits':>12} {'ratio':>7} {'must':>6}")
    for name, lines in found.items():
        for line, (value, other) in lines.items():
            least = MUSTS.get((name, line))
            ratio = value / other
            verdict = "" if least is None else "ok" if ratio >= least else "MISSED"
            print(f"{name:8} {line:14} {value:12.1f} {other:12.1f} {ratio:7.3f} {least or '':>6} {verdict}")
            if verdict == "MISSED":
                missed.append((name, line))
        if "train peak MB" in lines:
            saved, less = (lines[key][1] - lines[key][0] for key in ("memory MB", "train peak MB"))
            verdict = "ok" if less >= saved else "MISSED"
            print(f"{name:8} a step takes {less:.0f} MB less, the weights {saved:.0f} MB {verdict}")
            missed += [(name, "train peak MB")] if less < saved else []
    return missed


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the lines to this file too")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"some of {','.join(FORMATS)}")
    parser.add_argument("--hidden", type=int, default=4096, help="the model's width (default: 4096)")
    parser.add_argument("--layers", type=int, default=8, help="its layers (default: 8)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate (default: 64)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoding step, both models")
    arguments = parser.parse_args()
    for given, known in ((arguments.only, PARTS), (arguments.formats, FORMATS)):
        unknown = set(given.split(",")) - set(known)
        if unknown:
            parser.error(f"{', '.join(sorted(unknown))} is not one of {', '.join(known)}")
    return arguments


def main():
    arguments = read_arguments()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(config_of(arguments), folder, device)
        for name in arguments.formats.split(","):
            gc.collect()
            if device != "cpu":
                torch.cuda.empty_cache()
            found[name] = measure(folder, name, device, arguments)
    print(torch.cuda.get_device_name() if device != "cpu" else "cpu", torch.__version__, transformers.__version__)
    missed = report(found)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"missed": missed, "lines": found}, file, indent=1)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
